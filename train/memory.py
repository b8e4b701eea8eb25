"""What a training step needs, per device, before anything is compiled.

An estimate from shapes: it counts what must exist at the fullest moment, the end of the backward
pass through one block, and leaves out what XLA may or may not fuse. It picks the default model on
a GPU, and refuses what cannot fit before minutes are spent on finding out.
"""

import dataclasses
import os

import jax
from jax.sharding import Mesh
from jaxattn import eager

from models.config import ModelConfig
from train.loss import CHUNK_TOKENS
from train.mesh import row_shards

GiB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes per device, by what they are for."""

    weights: int
    """float32 parameters."""

    optimizer: int
    """Two float32 moments per parameter."""

    gradients: int
    """float32; twice under accumulation: the sum, and the microbatch's."""

    activations: int
    """Block inputs of every layer, and one block's intermediates with their gradients."""

    logits: int
    """One chunk of logits and its gradient, the output matrix and its float32 gradient."""

    scores: int
    """The score matrices of one layer where attention holds them whole (eager)."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return sum(getattr(self, f.name) for f in dataclasses.fields(self))

    def __str__(self) -> str:
        """One line, in GiB."""
        parts = [
            f"{f.name} {getattr(self, f.name) / GiB:.2f}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name)
        ]
        return f"{self.total / GiB:.2f} GiB per device: " + ", ".join(parts)


def plan(
    model: ModelConfig,
    mesh: Mesh,
    *,
    rows: int,
    seq_len: int,
    accum: int,
    remat: str,
    itemsize: int,
    attn: str,
) -> Plan:
    """Counts the bytes of a step.

    Args:
        model: the architecture.
        mesh: the devices.
        rows: of one microbatch, over all devices.
        seq_len: tokens of a row.
        accum: microbatches of a step.
        remat: "none" keeps every intermediate of every block; all else one block's at a time.
        itemsize: bytes of the compute dtype.
        attn: implementation in `jaxattn.IMPLEMENTATIONS`.
    """
    tensor = mesh.shape["tensor"]
    shards = mesh.shape["fsdp"] * tensor
    local_rows = max(1, rows // row_shards(mesh))
    tokens = local_rows * seq_len
    parameters = model.num_params() // shards
    block = tokens * itemsize * _intermediates(model, tensor)
    blocks = model.num_layers if remat == "none" else 1
    inputs = model.num_layers * tokens * model.hidden_size * itemsize
    chunk = min(tokens, CHUNK_TOKENS) * model.vocab_size // tensor
    output = model.hidden_size * model.vocab_size // tensor
    heads = model.num_heads // tensor
    return Plan(
        weights=4 * parameters,
        optimizer=8 * parameters,
        gradients=4 * parameters * (2 if accum > 1 else 1),
        activations=inputs + block * (blocks + 1),
        logits=chunk * (8 + itemsize) + output * (4 + itemsize),
        scores=eager.score_bytes(local_rows, seq_len, seq_len, heads) if attn == "eager" else 0,
    )


def available(device: jax.Device) -> int:
    """Bytes that jax may use on a device; for a CPU the machine's memory."""
    stats = device.memory_stats() if device.platform == "gpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(needed: Plan, device: jax.Device, *, rows: int, accum: int) -> None:
    """Refuses a plan that exceeds the device, and says what to change.

    Args:
        needed: the plan.
        device: one of the mesh.
        rows: of a microbatch, for the advice.
        accum: microbatches, for the advice.

    Raises:
        ValueError: with what is needed, what there is, and the cheapest remedy.
    """
    have = available(device)
    if needed.total <= have:
        return
    if needed.total - needed.scores <= have:
        remedy = "take --attn=pallas or --attn=xla, which hold no score matrix"
    elif needed.weights + needed.optimizer + needed.gradients > have:
        remedy = "weights and optimizer alone exceed it: more devices (--mesh.fsdp), or a smaller "
        remedy += "--model"
    elif rows > 1:
        remedy = f"take a smaller --batch_size, or more parts: --accum={2 * accum}"
    else:
        remedy = "take a shorter --seq_len, or split rows with --mesh.tensor"
    raise ValueError(
        f"the run needs about {needed}; the device has {have / GiB:.2f} GiB: {remedy}"
    )


def _intermediates(model: ModelConfig, tensor: int) -> int:
    """Numbers per token that one block makes and its backward pass reads."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim  # q, k, v, out
    return 4 * model.hidden_size + (heads + 4 * model.intermediate_size) // tensor
