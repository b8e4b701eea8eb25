"""What a training step needs, per device, before anything is compiled.

An estimate from shapes: it counts what must exist at the fullest moment, the end of the backward
pass through one block, and leaves out what XLA may or may not fuse. It picks the default model on
a GPU, and refuses what cannot fit before minutes are spent on finding out.
"""

import dataclasses

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
    """float32 parameters, and their copy in the compute type."""

    optimizer: int
    """Two float32 moments per parameter."""

    gradients: int
    """In the compute type; under accumulation their float32 sum too."""

    gathered: int
    """Over fsdp: the embedding table, and one block's weights and gradients."""

    activations: int
    """What remat keeps of every block, and everything of one block: a value's gradient takes its
    place."""

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
        remat: key of `models.internlm2.REMAT`.
        itemsize: bytes of the compute dtype.
        attn: implementation in `jaxattn.IMPLEMENTATIONS`.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    tokens = max(1, rows // row_shards(mesh)) * seq_len
    table = model.hidden_size * model.vocab_size
    of_block = (model.num_params() - 2 * table) // model.num_layers // tensor
    parameters = model.num_params() // (fsdp * tensor)
    kept, everything = _per_token(model, tensor, remat, attn)
    chunk = min(tokens, CHUNK_TOKENS) * model.vocab_size // tensor
    local = tokens // seq_len, seq_len, seq_len, model.num_heads // tensor
    return Plan(
        weights=parameters * (4 + (itemsize if itemsize < 4 else 0)),
        optimizer=parameters * 8,
        gradients=parameters * (itemsize + (4 if accum > 1 else 0)),
        gathered=(2 * of_block * itemsize + 4 * table // tensor) if fsdp > 1 else 0,
        activations=tokens * itemsize * (model.num_layers * kept + everything),
        logits=chunk * (8 + itemsize) + table // tensor * (4 + itemsize),
        scores=eager.score_bytes(*local) if attn == "eager" else 0,
    )


def check_fits(needed: Plan, have: int, *, rows: int, accum: int) -> None:
    """Refuses a plan that exceeds the device, and says what to change.

    Args:
        needed: the plan.
        have: bytes of the device.
        rows: of a microbatch, for the advice.
        accum: microbatches, for the advice.

    Raises:
        ValueError: with what is needed, what there is, and the cheapest remedy.
    """
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
    raise ValueError(f"the run needs about {needed}; the device has {have / GiB:.2f} GiB: {remedy}")


def _per_token(model: ModelConfig, tensor: int, remat: str, attn: str) -> tuple[int, int]:
    """Numbers per token and block that remat keeps, and that the block makes in all."""
    out = model.num_heads * model.head_dim // tensor
    qkv = out + 2 * model.num_kv_heads * model.head_dim // tensor
    everything = 4 * model.hidden_size + out + qkv + 4 * model.intermediate_size // tensor
    named = out if attn == "pallas" else 0  # only the kernel names its output
    dots = qkv + model.hidden_size + 2 * model.intermediate_size // tensor
    kept = {
        "none": everything,
        "dots": dots + named,
        "qkv": qkv + named,
        "attention": named,
        "full": 0,
    }[remat]
    return model.hidden_size + kept, everything
