"""One layer of the model: attention and SwiGLU, each after an RMSNorm, with residual connections.

B batch, T query pos, N query heads, K kv heads, G = N / K, g = G + 2, H head dim, D embed.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from models import fp8, sharding
from models.config import ModelConfig
from models.layers import SwiGLU, constant, normal, rms_norm
from models.lora import (
    NO_DROPOUT,
    DropoutKeys,
    LoRA,
    LoRAParam,
    add_adapter,
    combine,
    make_adapters,
    partition,
)
from models.qkv import split_qkv_and_rope
from models.quantize import quantize, weight_in_use
from models.tiles import over_tiles
from models.xla_workarounds import project

# (q_BTNH, k_BTKH, v_BTKH, layer_cache) -> (o_BTNH, result): the attention of a block. `layer_cache`
# is this layer's part of the KV cache, or None.
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
Rope = tuple[Array, Array]


class Attention(nnx.Module):
    """Query, key, value and output projections around an attention function from the caller.

    wqkv is fused as in HF: for each kv head its G query heads, then k, then v.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        lora: LoRA | None = None,
    ):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        g, std = config.group_size + 2, config.initializer_range
        self.wqkv_DKgH = normal(
            rngs, (D, K, g, H), ("embed", "heads", None, None), std, param_dtype
        )
        self.wo_NHD = normal(rngs, (N, H, D), ("heads", None, "embed"), std, param_dtype)
        self.bias = config.bias
        if config.bias:
            self.wqkv_bias_KgH = constant(0.0, (K, g, H), ("heads", None, None), param_dtype)
            self.wo_bias_D = constant(0.0, (D,), (None,), param_dtype)
        linear = {
            "wqkv": ((D, K, g, H), ("embed", "heads", None, None), 1),
            "wo": ((N, H, D), ("heads", None, "embed"), 2),
        }
        self.lora = make_adapters(lora, linear, rngs=rngs)

    def qkv(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        *,
        dropout: DropoutKeys = NO_DROPOUT,
        bound: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Project x, the output of the norm, to q, k, v and apply rotary embedding.

        The weights must have the dtype of x. `bound` is an upper bound of |x| for fp8 products
        (`models.fp8`); None: products in the dtype of x.
        """
        add = functools.partial(add_adapter, self.lora, dropout=dropout)
        T = sharding.positions(x_BTD)
        stream, split = ("batch", T, None), ("batch", T, "heads", None, None)
        wqkv_DKgH = weight_in_use(self.wqkv_DKgH, x_BTD.dtype)
        if bound is None:
            qkv_BTKgH = project("BTD,DKgH->BTKgH", x_BTD, wqkv_DKgH, out=split)
        else:
            qkv_BTKgH = fp8.product(x_BTD, wqkv_DKgH, bound, split)
        qkv_BTKgH = add("wqkv", qkv_BTKgH, "BTD,DKgH->BTKgH", x_BTD, x_axes=stream, out=split)
        if self.bias:
            qkv_BTKgH += self.wqkv_bias_KgH[...][None, None]
        return split_qkv_and_rope(qkv_BTKgH, *rope)

    def output(
        self,
        o_BTNH: Float[Array, "B T N H"],
        *,
        dropout: DropoutKeys = NO_DROPOUT,
        matmul: str = "bf16",
    ) -> Float[Array, "B T D"]:
        """Project the output of the attention function back to the width of the model."""
        T = sharding.positions(o_BTNH)
        stream, heads = ("batch", T, None), ("batch", T, "heads", None)
        wo_NHD = weight_in_use(self.wo_NHD, o_BTNH.dtype)
        if matmul == "fp8":
            y_BTD = fp8.product(o_BTNH, wo_NHD, fp8.largest(o_BTNH), stream)
        else:
            y_BTD = project("BTNH,NHD->BTD", o_BTNH, wo_NHD, out=stream)
        add = functools.partial(add_adapter, self.lora, dropout=dropout)
        y_BTD = add("wo", y_BTD, "BTNH,NHD->BTD", o_BTNH, x_axes=heads, out=stream)
        if self.bias:
            y_BTD += self.wo_bias_D[...][None, None]
        return y_BTD


class Block(nnx.Module):
    """One transformer layer: x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        lora: LoRA | None = None,
    ):
        D = config.hidden_size
        self.eps = config.rms_norm_eps
        self.attention_norm_D = constant(1.0, (D,), (None,), param_dtype)
        self.attention = Attention(config, rngs=rngs, param_dtype=param_dtype, lora=lora)
        self.ffn_norm_D = constant(1.0, (D,), (None,), param_dtype)
        self.ffn = SwiGLU(config, rngs=rngs, param_dtype=param_dtype, lora=lora)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        attend: Attend,
        layer_cache: Any = None,
        *,
        dropout: DropoutKeys = NO_DROPOUT,
        matmul: str = "bf16",
        tile_size: int | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply the layer to the residual stream x; also return the second result of `attend`.

        `rope` is the result of `rope_table`, `layer_cache` is passed to `attend`, `dropout` has the
        random keys of the adapters, `matmul` and `tile_size` are as in `Execution`.
        """
        # Gathered and dequantized once, not for every tile.
        block = self if tile_size is None else self._in_use(x_BTD.dtype)
        weights = partition(block, trained=LoRAParam if self._has_adapters() else nnx.Param)

        def tiled(function: Callable, *xs):
            def of_tile(trained, frozen, dropout, xs):
                return function(combine(trained, frozen), *xs, dropout=dropout, matmul=matmul)

            return over_tiles(of_tile, *weights, dict(dropout), xs, tile_size=tile_size)

        with jax.named_scope("attention"):
            q_BTNH, k_BTKH, v_BTKH = tiled(Block._before_attention, x_BTD, rope)
            o_BTNH, result = attend(q_BTNH, k_BTKH, v_BTKH, layer_cache)
        return tiled(Block._after_attention, x_BTD, o_BTNH), result

    def _before_attention(self, x_BTD, rope, *, dropout, matmul):
        """Return q, k, v of the norm of x."""
        normed_BTD, bound = self._norm(x_BTD, self.attention_norm_D[...], matmul)
        return self.attention.qkv(normed_BTD, rope, dropout=dropout, bound=bound)

    def _after_attention(self, x_BTD, o_BTNH, *, dropout, matmul):
        """Add the projected output of attention to x, then the feed-forward layer."""
        with jax.named_scope("attention"):
            y_BTD = self.attention.output(o_BTNH, dropout=dropout, matmul=matmul)
            x_BTD = checkpoint_name(x_BTD + y_BTD, "ffn_input")
        with jax.named_scope("ffn"):
            normed_BTD, bound = self._norm(x_BTD, self.ffn_norm_D[...], matmul)
            return x_BTD + self.ffn(normed_BTD, dropout=dropout, bound=bound)

    def _norm(self, x_BTD, weight_D, matmul):
        """Return the norm of x, and with fp8 its upper bound."""
        bound = fp8.norm_bound(weight_D) if matmul == "fp8" else None
        return rms_norm(x_BTD, weight_D, eps=self.eps), bound

    def _has_adapters(self) -> bool:
        return bool(self.attention.lora or self.ffn.lora)

    def _in_use(self, dtype) -> "Block":
        """Return the block with its linear layers as `weight_in_use` returns them."""
        block = jax.tree.map(lambda x: x, self)
        return _replace_linear(block, lambda param, _: weight_in_use(param, dtype))


LINEAR = {
    "wqkv": ("attention", "wqkv_DKgH", 1),
    "wo": ("attention", "wo_NHD", 2),
    "w1": ("ffn", "w1_DF", 1),
    "w3": ("ffn", "w3_DF", 1),
    "w2": ("ffn", "w2_FD", 1),
}
"""Linear layers of a block by LoRA target: module, parameter, number of input axes."""


def quantize_block(block: Block, kind: Literal["nf4", "int8"]) -> Block:
    """Replace the weights of a block's linear layers by quantized ones; return the block.

    Raises:
      ValueError: nf4, and an input axis is not a multiple of 64.
    """
    return _replace_linear(block, lambda w, inputs: quantize(w.get_value(), kind, inputs=inputs))


def _replace_linear(block: Block, new: Callable[[nnx.Param, int], Any]) -> Block:
    """Set the weights of the linear layers to new(parameter, number of input axes)."""
    for module, name, inputs in LINEAR.values():
        owner = getattr(block, module)
        param = getattr(owner, name)
        setattr(owner, name, param.replace(new(param, inputs)))
    return block
