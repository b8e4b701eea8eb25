"""What a run takes where no flag says otherwise, by device and model."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxattn import device_memory
from models.config import PRESETS, ModelConfig, RopeScaling
from models.remat import REMAT
from models.tokenizer import Tokenizer, load_tokenizer
from train import fit, memory
from train.attention import resolve_attention
from train.config import Config
from train.mesh import check_rows, make_mesh, row_shards

GPU_MODEL, CPU_MODEL = "internlm2-1.8b", "nano"
GPU_TOKENS = 32_768
"""Tokens of a step on each GPU that holds rows of its own: one row of the longest case."""
CPU_TOKENS = 2_048
PARAM_DTYPES = {"fp32": jnp.dtype("float32"), "bf16": jnp.dtype("bfloat16")}


REMAT_BY_SPEED = ("dots", "attention", "full")
"""More memory and less work first; what lies between gains little (measured at 1.8B)."""


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
    """In a step; a multiple of accum, and its part of the devices that split rows."""

    remat: str
    """Key of `models.remat.REMAT`."""

    scan: bool
    """Whether training's layers are one loop."""

    lr: float
    """Peak."""

    out: Path
    """The run's directory."""

    plan: memory.Plan
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
    if config.remat is not None and config.remat not in REMAT:
        raise ValueError(f"--remat={config.remat} must be one of {', '.join(REMAT)}")
    mesh = make_mesh(config.mesh)
    device = mesh.devices.flat[0]
    on_gpu = device.platform == "gpu"
    if config.remat == "offload" and "pinned_host" not in _memories(device):
        raise NotImplementedError(
            f"--remat=offload needs pinned host memory, which {device.device_kind} does not offer: "
            "take --remat=full"
        )
    rows = default_rows(config, mesh, on_gpu=on_gpu)
    check_rows(mesh, rows=rows, accum=config.accum)
    dtype = jnp.dtype(config.dtype or ("bfloat16" if on_gpu else "float32"))
    notes = []

    name = config.model
    if name is None:
        least = dataclasses.replace(config, remat=config.remat or REMAT_BY_SPEED[-1])
        have = device_memory(device) if on_gpu else None
        need = planned(least, PRESETS[GPU_MODEL], mesh, rows, dtype, "xla").total
        name, why = choose_model(need, have, device.device_kind)
        notes.append(f"model {name}: {why}")
    model, weights = read_model(name)
    model = _extended(model, config.rope_factor, config.seq_len)
    attn = resolve_attention(
        config.attn,
        model,
        mesh,
        rows=rows // config.accum,
        seq_len=config.seq_len,
        dtype=dtype,
        deterministic=config.deterministic,
    )
    have = device_memory(device)
    full = with_remat(config, model, mesh, rows, dtype, attn, have)
    plan = planned(full, model, mesh, rows, dtype, attn)
    remedy = advice(full, model, mesh, rows, dtype, attn, have)
    if remedy is not None and not config.dry_run:
        raise ValueError(
            f"the run needs about {plan}; the device has {have / memory.GiB:.2f} GiB: {remedy}"
        )
    if config.remat is None:
        size = f"{plan.total / memory.GiB:.1f} GiB"
        notes.append(f"remat {full.remat}: the fastest that fits, with {size}")
    tokenizer = _read_tokenizer(config.tokenizer, weights)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than the "
            f"{model.vocab_size} that {name} has room for: choose another --tokenizer or --model"
        )
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
        scan=in_scan(config, mesh),
        lr=config.optim.lr or _lr(name, weights) * (0.1 if config.optim.name == "lion" else 1.0),
        out=Path(config.out or f"runs/{short}-{config.seq_len}"),
        plan=plan,
        have=have,
        remedy=remedy,
        notes=tuple(notes),
    )


def choose_remat(need: dict[str, int], have: int) -> str:
    """The first, in order of speed, that leaves a margin for what no plan knows; else the last.

    And for XLA: above 80% of a GPU (87% of what jax takes) it computes values again to save memory,
    in an order of its own. Compiled for an H200, 7B at 32k then grew from 124 to 177 GiB.

    Args:
        need: bytes per device of each, fastest first.
        have: bytes of the device.
    """
    return next((remat for remat, total in need.items() if total <= 0.85 * have), [*need][-1])


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
        f"the {need / memory.GiB:.1f} GiB that {GPU_MODEL} needs "
        f"{'fit' if fits else 'do not fit'} the {have / memory.GiB:.1f} GiB of {device}"
    )
    return (GPU_MODEL if fits else CPU_MODEL), why


def default_rows(config: Config, mesh: Mesh | AbstractMesh, *, on_gpu: bool) -> int:
    """Rows of a step: those asked for, or as many as divide over devices and microbatches."""
    if config.batch_size is not None:
        return config.batch_size
    at_least = row_shards(mesh) * config.accum
    tokens = GPU_TOKENS * row_shards(mesh) if on_gpu else CPU_TOKENS
    return max(1, tokens // config.seq_len // at_least) * at_least


def with_remat(
    config: Config,
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    rows: int,
    dtype: np.dtype,
    attn: str,
    have: int,
) -> Config:
    """The configuration with the remat asked for, or the fastest that fits `have` bytes."""
    if config.remat is not None:
        return config
    all_of = {r: dataclasses.replace(config, remat=r) for r in REMAT_BY_SPEED}
    need = {r: planned(c, model, mesh, rows, dtype, attn).total for r, c in all_of.items()}
    return all_of[choose_remat(need, have)]


def planned(
    config: Config,
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    rows: int,
    dtype: np.dtype,
    attn: str,
) -> memory.Plan:
    """The memory that a run needs, with `rows` in a step and `attn` as its attention."""
    return memory.plan(
        model,
        mesh,
        rows=rows // config.accum,
        seq_len=config.seq_len,
        accum=config.accum,
        remat=config.remat or REMAT_BY_SPEED[-1],
        itemsize=dtype.itemsize,
        attn=attn,
        scan=in_scan(config, mesh),
        optim=config.optim,
        param_itemsize=PARAM_DTYPES[config.param_dtype].itemsize,
    )


def in_scan(config: Config, mesh: Mesh | AbstractMesh) -> bool:
    """Whether training's layers are one loop; a mesh without devices stands for GPUs."""
    if config.scan_layers is not None:
        return config.scan_layers
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform != "gpu"


def advice(
    config: Config,
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    rows: int,
    dtype: np.dtype,
    attn: str,
    have: int,
) -> str | None:
    """What to change so that the run fits `have` bytes a device; None where it does."""

    def needed(changed: Config) -> memory.Plan:
        runs = attn if changed.attn == config.attn else changed.attn
        return planned(changed, model, mesh, rows, dtype, runs)

    if needed(config).total <= have:
        return None
    return fit.remedy(needed, config, have, most_accum=rows // row_shards(mesh))


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


def _extended(model: ModelConfig, factor: float | None, seq_len: int) -> ModelConfig:
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


def _read_tokenizer(spec: str | None, weights: Path | None) -> Tokenizer:
    if spec is None and weights is not None and (weights / "tokenizer.model").exists():
        spec = str(weights)
    return load_tokenizer(spec or "byte")


def _lr(name: str, weights: Path | None) -> float:
    if weights is not None:
        return 2e-5
    return 2e-3 if name == "nano" else 3e-4
