"""`--dry_run`: what would run, what it needs, and what the compiler says it needs."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxattn import ALIASES, IMPLEMENTATIONS
from train.devices import device
from train.devices.mesh import check_rows
from train.flags.config import Config
from train.memory.plan import GiB, Plan
from train.memory.sizing import Sizing
from train.run.announce import introduce
from train.run.defaults import (
    GPU_MODEL,
    Settled,
    default_rows,
    read_model,
    settle,
)
from train.run.parts import compile_training, model_maker
from train.run.resolved import resolved
from train.say import say
from train.step.optim import optimizer
from train.step.state import abstract_state

DEVICES = {
    "h200": ("NVIDIA H200", 143_771 / 1024),
    "h100": ("NVIDIA H100 80GB", 81_559 / 1024),
    "a100": ("NVIDIA A100 80GB", 81_920 / 1024),
}
"""Names of GPUs, and their GiB."""


def dry_run(config: Config) -> None:
    """Says everything that can be known without reading data or making an array.

    Raises:
        ValueError, NotImplementedError, OSError: what is wrong, as in the run itself.
    """
    for flag, value in resolved(config).items():
        say(f"--{flag}={'(chosen)' if value is None else value}")
    if config.device is not None:
        _of_described(config, config.device)
        return
    settled = settle(config)
    introduce(config, settled)
    _say_plan(settled.plan, settled.have, settled.remedy)
    if settled.remedy is None:
        _compare(config, settled)


def _say_plan(plan: Plan, have: int, remedy: str | None) -> None:
    for field in dataclasses.fields(plan):
        if size := getattr(plan, field.name):
            say(f"  {field.name:<12} {size / GiB:8.2f} GiB")
    larger = "backward pass" if plan.backward > plan.logits else "loss"
    say(f"  at the fullest, in the {larger}: {plan.total / GiB:.2f} of {have / GiB:.2f} GiB")
    say("it fits" if remedy is None else f"it does not fit: {remedy}")


def _compare(config: Config, settled: Settled) -> None:
    """Compiles without weights, and puts the compiler's count beside the plan's."""
    begun = time.perf_counter()
    tx = optimizer(config.optim, settled.lr, config.steps, param_dtype=settled.param_dtype)
    graphdef, like = abstract_state(model_maker(config, settled), tx, settled.mesh)
    found = compile_training(config, settled, graphdef, tx, like).memory_analysis()
    state = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    total = state + found.temp_size_in_bytes
    plan = settled.plan
    say(
        f"XLA, after {time.perf_counter() - begun:.1f} s: {total / GiB:.2f} GiB per device "
        f"({state / GiB:.2f} state and batch, {found.temp_size_in_bytes / GiB:.2f} temporary"
        + (f", {found.host_temp_size_in_bytes / GiB:.2f} on the host" if plan.host else "")
        + f"); the plan {plan.total / GiB:.2f} GiB, {plan.total / total - 1:+.1%}"
    )
    if settled.mesh.devices.flat[0].platform == "cpu":
        say("a CPU's compiler fuses less than a GPU's: its temporary memory is larger")


def _of_described(config: Config, name: str) -> None:
    """The plan for a GPU that is not here; nothing is compiled."""
    kind, gib = _described(name)
    sizes = (config.mesh.data, config.mesh.fsdp or 1, config.mesh.tensor)
    mesh = AbstractMesh(sizes, ("data", "fsdp", "tensor"))
    rows = default_rows(config, mesh, on_gpu=True)
    check_rows(mesh, rows=rows, accum=config.accum)
    attn = ALIASES.get(config.attn, config.attn)
    if attn == "auto":
        attn = "pallas" if "H200" in kind or "H100" in kind else "xla"
    if attn not in IMPLEMENTATIONS:
        raise ValueError(f"--attn={attn} must be auto or one of {', '.join(IMPLEMENTATIONS)}")
    model, _ = read_model(config.model or GPU_MODEL)
    dtype, have = jnp.dtype(config.dtype or "bfloat16"), int(gib * device.SHARE * GiB)
    say(
        f"{config.model or GPU_MODEL}: {model.num_params():,} parameters on {mesh.size} {kind} "
        f"({' x '.join(f'{n} {s}' for n, s in mesh.shape.items())}), {dtype} compute; {rows} rows "
        f"x {config.seq_len} tokens a step in {config.accum} parts; attention {attn}"
    )
    sizing = Sizing(model=model, mesh=mesh, rows=rows, dtype=dtype, attn=attn)
    config = sizing.with_remat(config, have)
    say(f"remat {config.remat}")
    _say_plan(sizing.plan(config), have, sizing.advice(config, have))
    say(f"not compiled: this machine has {jax.devices()[0].device_kind}")


def _described(name: str) -> tuple[str, float]:
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    try:
        gib = float(name)
    except ValueError:
        gib = 0.0
    if gib <= 0:
        raise ValueError(f"--device={name} must be one of {', '.join(DEVICES)}, or a number of GiB")
    return f"GPU of {gib:g} GiB", gib
