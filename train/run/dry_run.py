"""`--dry_run`: what would run, what it needs, and what the compiler says it needs."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxattn import Mask, resolve
from jaxattn.device import GPUS, DeviceSpec, default_device, device_memory
from models.weights.abstract import abstract
from train.config.config import Config
from train.distributed import device
from train.distributed.mesh import check_rows, row_shards
from train.log import say
from train.memory.plan import GiB, Plan
from train.memory.sizing import Sizing
from train.run.announce import introduce
from train.run.flatten import resolved
from train.run.parts import compile_training, model_maker
from train.run.resolve import (
    GPU_MODEL,
    Settled,
    default_rows,
    extended,
    read_model,
    read_tokenizer,
    settle,
)
from train.step.optim import optimizer
from train.step.state import abstract_state


def dry_run(config: Config) -> None:
    """Says everything that can be known without reading data or making an array.

    Raises:
        ValueError, NotImplementedError, OSError: what is wrong, as in the run itself.
    """
    for flag, value in resolved(config).items():
        say(f"--{flag}={'(chosen)' if value is None else value}")
    if config.dry_run_device is not None:
        _of_described(config, _described(config.dry_run_device))
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


def _of_described(config: Config, gpu: DeviceSpec) -> None:
    """The plan for a GPU that is not here, after the checks of a run; nothing is compiled."""
    sizes = (config.mesh.data, config.mesh.fsdp or 1, config.mesh.tensor)
    mesh = AbstractMesh(sizes, ("data", "fsdp", "tensor"))
    rows = default_rows(config, mesh, on_gpu=True)
    check_rows(mesh, rows=rows, grad_accum=config.grad_accum)
    name = config.model or GPU_MODEL
    model, weights = read_model(name)
    model = extended(model, config.rope_factor, config.seq_len)
    dtype, have = jnp.dtype(config.dtype or "bfloat16"), device_memory(gpu)
    abstract(model, mesh=mesh)  # raises where the mesh does not divide it
    q, k = (
        jax.ShapeDtypeStruct(
            (rows // config.grad_accum // row_shards(mesh), config.seq_len, heads, model.head_dim),
            dtype,
        )
        for heads in (model.num_heads // sizes[2], model.num_kv_heads // sizes[2])
    )
    mask = Mask(segment_ids=jnp.ones((1, 1), jnp.int32))  # rows are packed
    asked = {"deterministic": config.deterministic, "device": gpu}
    attn, _ = resolve(config.attn, q, k, mask, **asked)
    read_tokenizer(config.tokenizer, weights, model, name)
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    say(
        f"{name}: {model.num_params():,} parameters on {mesh.size} "
        f"{gpu.device_kind} ({axes}), {dtype} compute; {rows} rows x {config.seq_len} tokens a "
        f"step in {config.grad_accum} parts; attention {attn}"
    )
    sizing = Sizing(model=model, mesh=mesh, rows=rows, dtype=dtype, attn=attn)
    config = sizing.with_remat(config, have)
    say(f"remat {config.remat}")
    _say_plan(sizing.plan(config), have, sizing.advice(config, have))
    say(f"not compiled: this machine has {default_device().device_kind}")


def _described(name: str) -> DeviceSpec:
    if name.lower() in GPUS:
        return dataclasses.replace(GPUS[name.lower()], memory_fraction=device.SHARE)
    try:
        gib = float(name)
    except ValueError:
        gib = 0.0
    if not 0 < gib < math.inf:
        raise ValueError(
            f"--dry_run_device={name} must be one of {', '.join(GPUS)}, or a number of GiB"
        )
    return DeviceSpec(f"Hopper GPU of {gib:g} GiB", gib, "9.0", memory_fraction=device.SHARE)
