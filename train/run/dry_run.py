"""`--dry_run`: print the flags in use, the memory plan and the compiler's own count."""

import dataclasses
import math
import shlex
import time

import jax

from jaxattn.device import GPUS, DeviceSpec, GiB
from train.config.config import Config
from train.distributed import device
from train.memory.plan import Plan
from train.run.build import abstract_training, compile_training
from train.run.resolve import Run, resolve
from train.run.summary import describe_run, flatten_config


def dry_run(config: Config) -> bool:
    """Print what a run needs, without reading data or making an array.

    Returns:
        Whether the run fits the devices.

    Raises:
        ValueError, NotImplementedError, OSError: As in the run itself.
    """
    name = config.dry_run_device
    run = resolve(config, None if name is None else device_spec(name))
    fits = run.memory_advice is None
    _print(paste(run), *describe_run(run), *plan_lines(run.plan, run.memory))
    _print("it fits" if fits else f"it does not fit: {run.memory_advice}")
    if name is not None:
        _print(f"not compiled: this machine has {jax.devices()[0].device_kind}")
    elif fits:
        _print(*_compare(run))
    return fits


def _print(*lines: str) -> None:
    if jax.process_index() == 0:
        print(*lines, sep="\n", flush=True)


def device_spec(name: str) -> DeviceSpec:
    """Return the GPU that --dry_run_device names, with the memory that a run allocates.

    Raises:
        ValueError: The name is none of `GPUS` and no number of GiB.
    """
    try:
        spec = GPUS.get(name.lower()) or DeviceSpec(
            f"Hopper GPU of {float(name):g} GiB", float(name), "9.0"
        )
        if not 0 < spec.memory < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--dry_run_device={name} must be one of {', '.join(GPUS)}, or a number of GiB"
        ) from None
    return dataclasses.replace(spec, memory_fraction=device.SHARE)


def paste(run: Run) -> str:
    """Return a command line for this run, with every choice that depends on device and model."""
    defaults, chosen, words = flatten_config(Config()), run.chosen(), []
    for flag, value in (flatten_config(run.config) | chosen).items():
        same = value == defaults[flag] and flag not in chosen
        if same or value is None or flag.startswith(("dry_run", "verbose", "recipe")):
            continue
        name = "data" if flag == "data.files" else flag
        if isinstance(value, tuple):
            words.append(f"--{name} {shlex.join(map(str, value))}")
        elif isinstance(value, bool) and defaults[flag] is not None:
            *section, last = name.split(".")
            words.append("--" + ".".join([*section, last if value else f"no_{last}"]))
        else:
            words.append(f"--{name}={shlex.quote(str(value))}")
    return " \\\n  ".join(["python -m train.main", *words]) + "\n"


def plan_lines(plan: Plan, memory: int) -> list[str]:
    """Return the plan by use; the lines add up to the total of its fullest moment."""
    always = ("weights", "optimizer", "sums", "gathered", "activations")
    backward = ("gradients", "block", "scores")
    in_loss = plan.logits > plan.backward
    uses = {
        name: getattr(plan, name) for name in (*always, *(("logits",) if in_loss else backward))
    }
    lines = [f"  {name:<12}{size / GiB:8.2f} GiB" for name, size in uses.items() if size]
    moment = "loss" if in_loss else "backward pass"
    lines.append(
        f"  {'total':<12}{plan.total / GiB:8.2f} of {memory / GiB:.2f} GiB, in the {moment}"
    )
    return lines + [f"  {'host':<12}{plan.host / GiB:8.2f} GiB"] * bool(plan.host)


def _compare(run: Run) -> list[str]:
    """Compile without weights, and compare the compiler's count of bytes with the plan."""
    start, plan = time.perf_counter(), run.plan
    found = compile_training(run, *abstract_training(run)).memory_analysis()
    assert found is not None, "XLA counts the memory of CPU and GPU programs"
    state = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    total = state + found.temp_size_in_bytes
    line = (
        f"XLA, after {time.perf_counter() - start:.1f} s: {total / GiB:.2f} GiB per device "
        f"({state / GiB:.2f} state and batch, {found.temp_size_in_bytes / GiB:.2f} temporary"
        + (f", {found.host_temp_size_in_bytes / GiB:.2f} on the host" if plan.host else "")
        + f"); the plan {plan.total / GiB:.2f} GiB, {plan.total / total - 1:+.1%}"
    )
    if run.device.platform != "cpu":
        return [line]
    return [line, "a CPU's compiler fuses less than a GPU's: its temporary memory is larger"]
