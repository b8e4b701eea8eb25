"""Execution options of a model: attention implementation, dtypes, rematerialization, scan."""

import dataclasses
from typing import Any, Literal, get_args

import jax.numpy as jnp

from jaxattn import Impl
from models.lora import LoRA
from models.remat import IN_TILES, parse_remat

MATMULS = ("bf16", "fp8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Options that change how a model is computed, but not its architecture.

    Every constructor and loader of a model takes one as `execution=`, and the model keeps it as
    `InternLM2.execution`.

    Attributes:
      attn: attention implementation, a name that `jaxattn.attention` accepts.
      dtype: dtype of the activations, and of the weights while they are used.
      param_dtype: dtype of the stored weights. Set it to `dtype` for inference: float32 takes
        twice the memory of bfloat16.
      remat: rematerialization policy of the backward pass, a key of `models.remat.REMAT`; or
        several with commas between them, which consecutive layers take in turn.
      tile_size: most tokens of a row, on each device, for which the products of a block are
        computed at once, see `models.tiles`; None: all. Generation does not use tiles.
      scan: run the layers of the forward pass as one `jax.lax.scan` over stacked weights, which
        compiles one layer instead of L. False compiles each layer. Then XLA does not copy weights
        out of their stacks, nor saved activations into and out of stacks (measured at 1.8B: 12%
        of a step). Prefill always scans; decoding never does.
      lora: adapters on the blocks' linear layers, which are then the only trained parameters, in
        float32; None: none, and all parameters are trained.
      quantize: storage of the blocks' linear layers, see `models.quantize`; None: param_dtype.
      matmul: "bf16" computes the matrix products of the blocks in `dtype`; "fp8" computes those of
        `InternLM2.hidden` (training, evaluation) in 8 bits, see `models.fp8`. Generation and the
        products with adapters always use `dtype`.
      deterministic: make the gradients of attention bitwise reproducible, see `jaxattn.attention`.

    Raises:
      ValueError: `attn` or `matmul` is unknown; or `remat` is not a key of `REMAT`, saves
        dequantized weights, or saves what is computed inside a tile.
      TypeError: a dtype is unknown.
    """

    attn: Impl = "auto"
    dtype: Any = "bfloat16"
    param_dtype: Any = "float32"
    remat: str = "full"
    tile_size: int | None = None
    scan: bool = True
    matmul: str = "bf16"
    deterministic: bool = False
    lora: LoRA | None = None
    quantize: Literal["nf4", "int8"] | None = None

    def __post_init__(self):
        if self.attn not in get_args(Impl):
            raise ValueError(f"attn={self.attn!r} must be one of {', '.join(get_args(Impl))}")
        names = parse_remat(self.remat)
        if self.tile_size is not None and self.tile_size < 1:
            raise ValueError(f"tile_size={self.tile_size} must be at least 1")
        if self.tile_size is not None and (outside := set(names) - set(IN_TILES)):
            raise ValueError(
                f"remat={outside.pop()!r} would save what tiles recompute: without tile_size, or "
                f"use one of {', '.join(IN_TILES)}"
            )
        if self.quantize is not None and "none" in names:
            raise ValueError(
                f"remat='none' would keep the dequantized copy of every {self.quantize} weight: "
                "use 'dots' or another policy"
            )
        if self.matmul not in MATMULS:
            raise ValueError(f"matmul={self.matmul!r} must be one of {', '.join(MATMULS)}")
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))


TRAINING = Execution()
"""Default of the constructors: weights are stored in float32 and used in bfloat16."""
INFERENCE = Execution(param_dtype="bfloat16")
"""Default of the loaders: weights are stored and used in bfloat16."""
