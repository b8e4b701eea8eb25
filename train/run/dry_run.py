"""`--dry_run`: print the flags in use, the memory plan and the compiler's own count."""

import dataclasses
import math
import time
from collections.abc import Sequence

import jax

from jaxattn.device import GPUS, DeviceSpec, GiB
from train.config.command_line import check_complete
from train.config.config import Config
from train.config.words import flatten_config
from train.distributed import device
from train.run.build import abstract_training, compile_training
from train.run.repeat import as_command, as_yaml
from train.run.resolve import Run, resolve
from train.run.summary import describe_run


def dry_run(config: Config) -> bool:
    """Print what a run needs, without reading data or making an array.

    Returns:
        Whether the run fits the devices. A plan needs no data, so that a run which has none still
        fits.

    Raises:
        ValueError, NotImplementedError, OSError: As in the run itself.
    """
    name, run = config.dry_run_device, _resolve(config)
    fits = run.memory_advice is None
    _print(as_command(run), *describe_run(run), *plan_lines(run))
    _print("it fits" if fits else f"it does not fit: {run.memory_advice}")
    if name is not None:
        _print(f"not compiled: this machine has {jax.devices()[0].device_kind}")
    elif fits:
        _print(*_compare(run))
    if refused := _refused(config):
        _print(f"the run would be refused: {refused}")
    return fits


def print_config(config: Config, notes: Sequence[str]) -> None:
    """Print the flags that repeat a run as YAML, with notes as comments; errors as in `dry_run`."""
    run, given = _resolve(config), flatten_config(config)
    if refused := _refused(config):
        notes = (*notes, f"a run would be refused: {refused}")
    chosen = [flag for flag in run.chosen() if given[flag] in (None, "auto")]
    if chosen:
        note = f"chosen for {run.device.device_kind}: {', '.join(chosen)}"
        notes = (*notes, note, "without these lines another machine makes its own choice")
    _print(*(f"# {note}" for note in notes), as_yaml(run).rstrip())


def _refused(config: Config) -> str:
    """Return the reason for which `train.main` refuses the flags; "" if it does not."""
    try:
        check_complete(config)
    except ValueError as error:
        return str(error)
    return ""


def _resolve(config: Config) -> Run:
    name = config.dry_run_device
    return resolve(config, None if name is None else device_spec(name))


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


def plan_lines(run: Run) -> list[str]:
    """Return the plan by use; the lines add up to the total of its fullest moment."""
    plan = run.plan
    moment, uses = plan.fullest
    lines = [f"  {name:<12}{size / GiB:8.2f} GiB" for name, size in uses.items()]
    lines.append(
        f"  {'total':<12}{plan.total / GiB:8.2f} of {run.memory / GiB:.2f} GiB, in the {moment}"
    )
    return lines + [f"  {'host':<12}{plan.host / GiB:8.2f} of {run.host / GiB:.2f} GiB"] * bool(
        plan.host
    )


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
