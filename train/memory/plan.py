"""What a training step needs, per device, before anything is compiled.

An estimate from shapes. Weights, optimizer and what remat keeps are there all the time; the logits
are gone before the gradients grow, so the fullest moment is either the end of the loss or that of
the backward pass through one block. Under a scan all gradients are there by then, as stacks; where
each layer is compiled on its own, its gradients take the place of what remat kept of it. What XLA
may or may not fuse is left out. The estimate picks the default model on a GPU, and refuses what
cannot fit before minutes are spent on finding out.
"""

import dataclasses
from typing import Literal

from jax.sharding import AbstractMesh, Mesh

from jaxattn import eager, xla
from jaxattn.sharded import kv_copies
from models.config import ModelConfig
from models.lora import LoRA, adapter_params_count
from models.quantize import BLOCK as NF4_BLOCK
from models.quantize import SCALE_BLOCK
from train.config.sections import OptimConfig
from train.distributed.mesh import head_shards, row_shards
from train.step.adam8bit import BLOCK
from train.step.loss import CHUNK_TOKENS

GiB = 2**30
NF4_BYTES = 0.5 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * SCALE_BLOCK)
"""Bytes of a weight in NF4: its code, and its share of the scales and of their factors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes per device, by what they are for."""

    weights: int
    """Parameters, and their copy in the compute type: where that is another, or where layers are
    taken out of their stacks."""

    optimizer: int
    """Moments."""

    sums: int
    """Under accumulation: the float32 sum of the gradients."""

    gathered: int
    """Over fsdp and seq: the embedding table, and one block's weights and gradients."""

    activations: int
    """What remat keeps of every block."""

    logits: int
    """One chunk of logits and its gradient, the output matrix and its float32 gradient."""

    gradients: int
    """In the compute type; without a scan what of them exceeds the activations."""

    block: int
    """Everything of one block: a value's gradient takes its place."""

    scores: int
    """The score matrices of one layer: whole ones (eager), or those of a slice (xla)."""

    host: int
    """What remat keeps in the host's memory; not part of the total."""

    @property
    def backward(self) -> int:
        """What the backward pass holds besides what is always there."""
        return self.gradients + self.block + self.scores

    @property
    def total(self) -> int:
        """The fullest moment."""
        always = self.weights + self.optimizer + self.sums + self.gathered + self.activations
        return always + max(self.logits, self.backward)

    def __str__(self) -> str:
        """One line, in GiB."""

        def named(*names: str) -> str:
            have = [n for n in names if getattr(self, n)]
            return ", ".join(f"{n} {getattr(self, n) / GiB:.2f}" for n in have)

        always = named("weights", "optimizer", "sums", "gathered", "activations")
        backward, loss = named("gradients", "block", "scores"), named("logits")
        host = f"; on the host {self.host / GiB:.2f}" if self.host else ""
        return (
            f"{self.total / GiB:.2f} GiB per device: {always}, and the larger of {backward} "
            f"(backward pass) and {loss} (loss){host}"
        )


def plan(
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    rows: int,
    seq_len: int,
    grad_accum: int,
    remat: str,
    itemsize: int,
    attn: str,
    scan: bool,
    optim: OptimConfig | None = None,
    param_itemsize: int = 4,
    lora: LoRA | None = None,
    quantize: Literal["nf4", "int8"] | None = None,
    matmul: str = "bf16",
) -> Plan:
    """Count the bytes of a step.

    Args:
        model: the architecture.
        mesh: the devices.
        rows: of one microbatch, over all devices.
        seq_len: tokens of a row.
        grad_accum: microbatches of a step.
        remat: key of `models.remat.REMAT`.
        itemsize: bytes of the compute dtype.
        attn: implementation in `jaxattn.IMPLEMENTATIONS`.
        scan: whether all layers are one loop.
        optim: the optimizer; None: AdamW in float32.
        param_itemsize: bytes of a stored weight; with adapters, of a frozen one.
        lora: adapters, which are then the only trained weights; None: all are trained.
        quantize: format of the frozen linear layers of the blocks; None: param_itemsize.
        matmul: "bf16" or "fp8".
    """
    seq, tensor = mesh.shape["seq"], mesh.shape["tensor"]
    sharded = mesh.shape["fsdp"] * seq  # devices that share the stored weights
    batch = max(1, rows // row_shards(mesh))
    tokens = batch * seq_len // seq
    table = model.hidden_size * model.vocab_size
    of_block = (model.num_params() - 2 * table) // model.num_layers // tensor
    parameters = model.num_params() // (sharded * tensor)
    in_blocks = 1 - 2 * table / model.num_params()
    kept, on_host, everything = _per_token(model, mesh, remat, itemsize, attn, matmul)
    chunk = min(tokens, CHUNK_TOKENS) * model.vocab_size // tensor
    local = batch, seq_len, seq_len, -(-model.num_heads // head_shards(mesh))
    scores = {"eager": eager, "xla": xla}
    moments = _moment_bytes(optim or OptimConfig(), in_blocks)
    copied = 1.0 if itemsize != param_itemsize else 0.0 if scan else in_blocks
    activations = tokens * model.num_layers * kept
    always = Plan(
        weights=int(parameters * (param_itemsize + copied * itemsize)),
        optimizer=int(parameters * moments),
        sums=parameters * 4 if grad_accum > 1 else 0,
        gathered=(2 * of_block * itemsize + 4 * table // tensor) if sharded > 1 else 0,
        activations=activations,
        logits=chunk * (8 + itemsize) + table // tensor * (4 + itemsize),
        gradients=max(0, parameters * itemsize - (0 if scan else activations)),
        block=tokens * everything,
        scores=scores[attn].score_bytes(*local) if attn in scores else 0,
        host=tokens * model.num_layers * on_host,
    )
    if lora is None:
        return always
    # The adapters alone have moments, gradients and sums, all of them float32. A frozen weight is
    # copied only to another dtype: layers are used in place in their stacks.
    trained = adapter_params_count(lora, model) // (sharded * tensor)
    cast = 0 if itemsize == param_itemsize else itemsize
    stored = {"nf4": NF4_BYTES, "int8": 1.0, None: param_itemsize + cast}[quantize]
    linear = int(parameters * in_blocks)
    frozen = linear * stored + (parameters - linear) * param_itemsize
    return dataclasses.replace(
        always,
        weights=int(frozen + trained * (4 + itemsize)),
        optimizer=int(trained * moments),
        sums=trained * 4 if grad_accum > 1 else 0,
        gathered=(of_block * itemsize + itemsize * table // tensor) if sharded > 1 else 0,
        logits=chunk * (8 + itemsize),
        gradients=trained * 4,
        # The outputs of adapters of gate and up; one layer's weights in the compute type.
        block=always.block
        + tokens * 2 * itemsize * model.intermediate_size // tensor
        + (of_block * itemsize if quantize else 0),
    )


def _moment_bytes(optim: OptimConfig, in_blocks: float) -> float:
    """Bytes of optimizer state per parameter; `in_blocks` is the share of the blocks in them."""
    of_adam = {"fp32": 8.0, "bf16": 4.0, "int8": 2 * (1 + 4 / BLOCK)}[optim.moment_dtype]
    of_muon = 4 * in_blocks + 8 * (1 - in_blocks)
    # Adafactor has a row and a column for each matrix.
    return {"adamw": of_adam, "lion": 4.0, "adafactor": 0.0, "muon": of_muon}[optim.name]


def _per_token(
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    remat: str,
    itemsize: int,
    attn: str,
    matmul: str,
) -> tuple[int, int, int]:
    """Bytes per token and block: kept on the device, kept on the host, made by a block in all."""
    embed, tensor = model.hidden_size, mesh.shape["tensor"]
    out = model.num_heads * model.head_dim // tensor
    kv = 2 * model.num_kv_heads * model.head_dim // tensor
    qkv, exchanged = out + kv, 0
    if mesh.shape["seq"] > 1:  # q, k, v and out once more, for the heads that a device attends with
        qkv = out + kv * kv_copies(model.num_heads, model.num_kv_heads, head_shards(mesh))
        exchanged = qkv + out
    ffn = model.intermediate_size // tensor
    lse = 4 * model.num_heads // tensor
    if attn not in ("pallas", "pallas_mma"):  # only the kernel names its output
        named = lse = 0
    else:
        named = out
    # Both norms keep what they read and made in float32; SwiGLU six arrays.
    all_saved = itemsize * (4 * embed + qkv + named + 6 * ffn) + 16 * embed + lse
    if matmul == "fp8":  # SwiGLU keeps gate and up; the inputs of the products have 8 bits
        all_saved -= itemsize * (2 * embed + 4 * ffn) - (2 * embed + out)
    kept, on_host = {
        "none": (all_saved, 0),
        "dots": (itemsize * (2 * embed + qkv + named + 2 * ffn) + lse, 0),
        "qkv": (itemsize * (embed + qkv + named) + lse, 0),
        "attention": (itemsize * (embed + named) + lse, 0),
        "full": (itemsize * embed, 0),
        "offload": (lse, itemsize * (embed + named)),
    }[remat]
    return kept, on_host, itemsize * (4 * embed + out + qkv + exchanged + 4 * ffn)
