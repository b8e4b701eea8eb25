"""Plan the memory of a training step, per device, before anything is compiled.

An estimate from shapes. Weights, optimizer and what remat keeps are there all the time; the logits
are gone before the gradients grow, and activations before the weights are updated. So the fullest
moment is the end of the loss, that of the backward pass through one block, or the update. Under a
scan all gradients are there by then, as stacks; where each layer is compiled on its own, its
gradients take the place of what remat kept of it. What XLA may or may not fuse is left out. The
estimate picks the default model on a GPU, and refuses what cannot fit before minutes are spent on
finding out.
"""

import dataclasses
from typing import Literal

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxattn import eager, xla
from jaxattn.sharded import kv_copies
from models.config import ModelConfig
from models.lora import LoRA, adapter_params_count
from models.quantize import BLOCK as NF4_BLOCK
from models.quantize import SCALE_BLOCK
from models.remat import parse_remat
from train.config.sections import OptimConfig
from train.distributed.mesh import head_shards, row_shards
from train.step.adam8bit import BLOCK
from train.step.loss import CHUNK_TOKENS
from train.step.update import by_layer

GiB = 2**30
UPDATE_BYTES = 10
"""Bytes per weight of the largest stack that an update of whole stacks with int8 moments holds:
both moments in float32, since their largest number is needed before the first is quantized, and
half as much of the next stack. By the compiler's count, 17 GiB at 7B and 44 GiB at 20B (jax
0.12.0)."""
UPDATE_BYTES_IN_LAYERS = 13
"""Bytes per weight that an update layer by layer holds of one layer, or of the embedding table. By
the compiler's count, 4.3 GiB at 7B and 6.4 GiB at 20B, both of the table; 13.1 bytes per weight of
a layer of 17M weights, which is larger than its model's table (jax 0.12.0, for an H200)."""
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
    """Saved activations of all blocks."""

    logits: int
    """One chunk of logits and its gradient, the output matrix and its float32 gradient."""

    gradients: int
    """In the compute type; without a scan what of them exceeds the activations."""

    block: int
    """Everything of one block: a value's gradient takes its place."""

    scores: int
    """The score matrices of one layer: whole ones (eager), or those of a slice (xla)."""

    update: int
    """With int8 moments: all gradients and float32 copies of one layer or of the largest stacks
    (`train.step.update`), less the copies of weights, which are gone by then."""

    host: int
    """Saved activations in host memory, for each device; not part of the total."""

    @property
    def fullest(self) -> tuple[str, dict[str, int]]:
        """The fullest moment, and the bytes of each use in it."""
        state = ("weights", "optimizer", "sums")
        forward = (*state, "gathered", "activations")
        moments = {
            "backward pass": (*forward, "gradients", "block", "scores"),
            "loss": (*forward, "logits"),
            "update": (*state, "update"),
        }
        uses = {
            moment: {name: getattr(self, name) for name in names if getattr(self, name)}
            for moment, names in moments.items()
        }
        return max(uses.items(), key=lambda moment: sum(moment[1].values()))

    @property
    def total(self) -> int:
        """Bytes of the fullest moment; the host's are not among them."""
        return sum(self.fullest[1].values())

    def __str__(self) -> str:
        """One line, in GiB."""
        moment, uses = self.fullest
        named = ", ".join(f"{name} {size / GiB:.2f}" for name, size in uses.items())
        host = f"; on the host {self.host / GiB:.2f}" if self.host else ""
        return f"{self.total / GiB:.2f} GiB per device in the {moment}: {named}{host}"


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
    tile_size: int | None = None,
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
        remat: as in `models.execution.Execution`.
        itemsize: bytes of the compute dtype.
        attn: implementation in `jaxattn.IMPLEMENTATIONS`.
        scan: whether all layers are one loop.
        tile_size: as in `models.execution.Execution`.
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
    at_once = tokens  # of which matrix products are computed
    block = at_once * everything
    if tile_size is not None and tile_size < seq_len // seq:
        at_once = tile_size * batch
        block = tokens * _in_attention(model, mesh, itemsize) + at_once * everything
        block += 0 if lora else 4 * of_block  # sums of its weights' gradients in float32
    if scan:  # of a group of layers with a policy each: weights, gradients and their stack
        block += 3 * itemsize * of_block * (len(parse_remat(remat)) - 1)
    chunk = min(tokens, CHUNK_TOKENS) * model.vocab_size // tensor
    local = batch, seq_len, seq_len, -(-model.num_heads // head_shards(mesh))
    scores = {"eager": eager, "xla": xla}
    optim = optim or OptimConfig()
    moments, int8 = _moment_bytes(optim, in_blocks), optim.moment_dtype == "int8"
    if by_layer(optim, scan=scan, lora=lora is not None):
        in_update = UPDATE_BYTES_IN_LAYERS * max(of_block // sharded, table // (sharded * tensor))
    else:
        stack = model.num_layers * model.hidden_size * model.intermediate_size
        in_update = UPDATE_BYTES * stack // (sharded * tensor)
    copied = 1.0 if itemsize != param_itemsize else 0.0 if scan else in_blocks
    activations = round(tokens * model.num_layers * kept)
    always = Plan(
        weights=int(parameters * (param_itemsize + copied * itemsize)),
        optimizer=int(parameters * moments),
        sums=parameters * 4 if grad_accum > 1 else 0,
        gathered=(2 * of_block * itemsize + 4 * table // tensor) if sharded > 1 else 0,
        activations=activations,
        logits=chunk * (8 + itemsize) + table // tensor * (4 + itemsize),
        gradients=max(0, parameters * itemsize - (0 if scan else activations)),
        block=block,
        scores=scores[attn].score_bytes(*local) if attn in scores else 0,
        update=int(parameters * itemsize * (1 - copied) + in_update) if int8 else 0,
        host=round(tokens * model.num_layers * on_host),
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
        update=0,
        # The outputs of adapters of gate and up; one layer's weights in the compute type.
        block=always.block
        + at_once * 2 * itemsize * model.intermediate_size // tensor
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
) -> tuple[float, float, int]:
    """Bytes per token and block: kept on the device, kept on the host, made by a block in all.

    Of several policies the kept bytes are the mean.
    """
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
    of_policy = {
        "none": (all_saved, 0),
        "dots": (itemsize * (2 * embed + qkv + named + 2 * ffn) + lse, 0),
        "qkv": (itemsize * (embed + qkv + named) + lse, 0),
        "attention": (itemsize * (embed + named) + lse, 0),
        "full": (itemsize * embed, 0),
        "offload": (lse, itemsize * (embed + named)),
        "offload_input": (0, itemsize * embed),
    }
    kept, on_host = np.mean([of_policy[name] for name in parse_remat(remat)], axis=0)
    return kept, on_host, itemsize * (4 * embed + out + qkv + exchanged + 4 * ffn)


def _in_attention(model: ModelConfig, mesh: Mesh | AbstractMesh, itemsize: int) -> int:
    """Bytes per token of a tiled block in the backward pass of attention, whose rows are whole.

    Two residual streams (x and its gradient), q, k, v, the gradients of the output and of k and v,
    and the sum of dq in float32. A mesh that splits T holds q, k, v and the gradient of the output
    once more, before the exchange.
    """
    tensor, seq = mesh.shape["tensor"], mesh.shape["seq"]
    out, kv = (n * model.head_dim // tensor for n in (model.num_heads, model.num_kv_heads))
    copies = kv_copies(model.num_heads, model.num_kv_heads, head_shards(mesh)) if seq > 1 else 1
    exchanged = 2 * out + 2 * kv if seq > 1 else 0
    return itemsize * (2 * model.hidden_size + 2 * out + 4 * copies * kv + exchanged) + 4 * out
