"""What a run takes where no flag says otherwise, by device and model."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxattn.device import device_memory
from models.config import PRESETS, ModelConfig, RopeScaling
from models.tokenizer import Tokenizer, load_tokenizer
from train.attention import resolve_attention
from train.config.config import Config
from train.distributed.mesh import check_rows, make_mesh, row_shards
from train.memory.plan import GiB, Plan
from train.memory.sizing import PARAM_DTYPES, REMAT_BY_SPEED, Sizing, in_scan

GPU_MODEL, CPU_MODEL = "internlm2-1.8b", "nano"
GPU_TOKENS = 32_768
"""Tokens of a step on each GPU that holds rows of its own: one row of the longest case."""
CPU_TOKENS = 2_048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settled:
    """A run without open questions."""

    name: str
    """Of the model, for people and paths."""

    model: ModelConfig
    """The architecture."""

    weights: Path | None
    """HF directory to load, or None for random weights."""

    tokenizer: Tokenizer
    """Its vocabulary fits the model's."""

    mesh: Mesh
    """All devices."""

    attn: str
    """Implementation that runs."""

    dtype: np.dtype
    """Compute type."""

    param_dtype: np.dtype
    """What weights are stored in."""

    rows: int
    """In a step; a multiple of grad_accum, and its part of the devices that split rows."""

    remat: str
    """Key of `models.remat.REMAT`."""

    scan: bool
    """Whether training's layers are one loop."""

    lr: float
    """Peak."""

    out: Path
    """The run's directory."""

    plan: Plan
    """What it needs in memory."""

    have: int
    """Bytes of a device."""

    remedy: str | None
    """What to change where the plan exceeds the device: only a dry run goes on then."""

    notes: tuple[str, ...]
    """What was chosen and why, for the log."""


def settle(config: Config) -> Settled:
    """Chooses what is open, and refuses what cannot run, before any work is done.

    Raises:
        ValueError: unknown model, tokenizer too large, a mesh or memory that does not fit.
        NotImplementedError: an attention implementation that cannot run here.
        OSError: a model or tokenizer that cannot be read.
    """
    mesh = make_mesh(config.mesh)
    device = mesh.devices.flat[0]
    on_gpu = device.platform == "gpu"
    if config.remat == "offload" and "pinned_host" not in _memories(device):
        raise NotImplementedError(
            f"--remat=offload needs pinned host memory, which {device.device_kind} does not offer: "
            "take --remat=full"
        )
    rows = default_rows(config, mesh, on_gpu=on_gpu)
    check_rows(mesh, rows=rows, grad_accum=config.grad_accum)
    dtype = jnp.dtype(config.dtype or ("bfloat16" if on_gpu else "float32"))
    notes = []

    name = config.model
    if name is None:
        least = dataclasses.replace(config, remat=config.remat or REMAT_BY_SPEED[-1])
        have = device_memory(device) if on_gpu else None
        gpu = Sizing(model=PRESETS[GPU_MODEL], mesh=mesh, rows=rows, dtype=dtype, attn="xla")
        need = gpu.plan(least).total
        name, why = choose_model(need, have, device.device_kind)
        notes.append(f"model {name}: {why}")
    model, weights = read_model(name)
    model = extended(model, config.rope_factor, config.seq_len)
    attn = resolve_attention(
        config.attn,
        model,
        mesh,
        rows=rows // config.grad_accum,
        seq_len=config.seq_len,
        dtype=dtype,
        deterministic=config.deterministic,
    )
    have = device_memory(device)
    sizing = Sizing(model=model, mesh=mesh, rows=rows, dtype=dtype, attn=attn)
    full = sizing.with_remat(config, have)
    plan, remedy = sizing.plan(full), sizing.advice(full, have)
    if remedy is not None and not config.dry_run:
        raise ValueError(
            f"the run needs about {plan}; the device has {have / GiB:.2f} GiB: {remedy}"
        )
    if config.remat is None:
        size = f"{plan.total / GiB:.1f} GiB"
        notes.append(f"remat {full.remat}: the fastest that fits, with {size}")
    tokenizer = read_tokenizer(config.tokenizer, weights, model, name)
    short = weights.name if weights else name
    return Settled(
        name=name,
        model=model,
        weights=weights,
        tokenizer=tokenizer,
        mesh=mesh,
        attn=attn,
        dtype=dtype,
        param_dtype=PARAM_DTYPES[config.param_dtype],
        rows=rows,
        remat=full.remat or REMAT_BY_SPEED[-1],
        scan=in_scan(full, mesh),
        lr=config.optim.lr or _lr(name, weights) * (0.1 if config.optim.name == "lion" else 1.0),
        out=Path(config.out or f"runs/{short}-{config.seq_len}"),
        plan=plan,
        have=have,
        remedy=remedy,
        notes=tuple(notes),
    )


def choose_model(need: int, have: int | None, device: str) -> tuple[str, str]:
    """The default preset, and why.

    Args:
        need: bytes per device of a run of the GPU's model.
        have: bytes of a GPU; None without one.
        device: what to call it.
    """
    if have is None:
        return CPU_MODEL, f"there is no GPU, only {device}"
    fits = need <= have
    why = (
        f"the {need / GiB:.1f} GiB that {GPU_MODEL} needs "
        f"{'fit' if fits else 'do not fit'} the {have / GiB:.1f} GiB of {device}"
    )
    return (GPU_MODEL if fits else CPU_MODEL), why


def default_rows(config: Config, mesh: Mesh | AbstractMesh, *, on_gpu: bool) -> int:
    """Rows of a step: those asked for, or as many as divide over devices and microbatches."""
    if config.batch_size is not None:
        return config.batch_size
    at_least = row_shards(mesh) * config.grad_accum
    tokens = GPU_TOKENS * row_shards(mesh) if on_gpu else CPU_TOKENS
    return max(1, tokens // config.seq_len // at_least) * at_least


def read_model(name: str) -> tuple[ModelConfig, Path | None]:
    """The architecture, and the directory of its weights if it has any.

    Raises:
        ValueError: no such preset, nor a directory with a readable config.json.
    """
    if name in PRESETS:
        return PRESETS[name], None
    file = Path(name) / "config.json"
    if not file.exists():
        what = "a directory without config.json" if Path(name).is_dir() else "no directory"
        raise ValueError(f"--model={name} is no preset ({', '.join(PRESETS)}) and {what}")
    try:
        return ModelConfig.from_hf(json.loads(file.read_text())), Path(name)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def extended(model: ModelConfig, factor: float | None, seq_len: int) -> ModelConfig:
    """The model with --rope_factor, after checking that its positions reach."""
    scaling = model.rope_scaling
    if factor is not None:
        scaling = RopeScaling(type=scaling.type if scaling else "dynamic", factor=factor)
    trained = model.max_position_embeddings
    reach = int(trained * (scaling.factor if scaling else 1))
    if seq_len > reach:
        how = f"{scaling.type} scaling by {scaling.factor:g}" if scaling else "no rotary scaling"
        raise ValueError(
            f"--seq_len={seq_len} is beyond the {reach:,} positions of the model ({trained:,}, "
            f"{how}): --rope_factor={math.ceil(seq_len / trained)} extends it, or take a shorter "
            "--seq_len"
        )
    return model if factor is None else dataclasses.replace(model, rope_scaling=scaling)


def _memories(device: jax.Device) -> set[str]:
    return {memory.kind for memory in device.addressable_memories()}


def read_tokenizer(
    spec: str | None, weights: Path | None, model: ModelConfig, name: str
) -> Tokenizer:
    """The tokenizer that is named, or that of the trained weights; bytes for random ones.

    Args:
        spec: --tokenizer.
        weights: directory of the model's weights, if it has any.
        model: has room for so many tokens.
        name: of the model.

    Raises:
        ValueError: it is larger than the model's vocabulary, or trained weights have none.
        OSError: it cannot be read.
    """
    try:
        tokenizer = load_tokenizer(spec or weights or "byte")
    except FileNotFoundError as error:
        if spec is not None:
            raise
        raise ValueError(
            f"{error}: name one with --tokenizer ('byte' for a model that was trained on bytes)"
        ) from error
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than the "
            f"{model.vocab_size} that {name} has room for: choose another --tokenizer or --model"
        )
    return tokenizer


def _lr(name: str, weights: Path | None) -> float:
    if weights is not None:
        return 2e-5
    return 2e-3 if name == "nano" else 3e-4
