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
from models.lora import NO_DROPOUT, DropoutKeys, LoRA, add_adapter, make_adapters
from models.qkv import split_qkv_and_rope
from models.quantize import quantize, weight_in_use
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

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: Rope,
        attend: Attend,
        layer_cache: Any = None,
        *,
        dropout: DropoutKeys = NO_DROPOUT,
        bound: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Project to q, k, v, apply rotary embedding and attention, project back.

        Args:
          x_BTD: output of the norm; the weights must have its dtype.
          rope: cos and sin from `rope_table`.
          attend: attention function, see `Attend`.
          layer_cache: passed to `attend`.
          dropout: random keys of the adapters' dropout.
          bound: upper bound of |x|, for fp8 products (`models.fp8`); None: products in the dtype
            of x.

        Returns:
          The output [B, T, D] and the second result of `attend`.
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
        q_BTNH, k_BTKH, v_BTKH = split_qkv_and_rope(qkv_BTKgH, *rope)

        o_BTNH, result = attend(q_BTNH, k_BTKH, v_BTKH, layer_cache)

        wo_NHD, heads = weight_in_use(self.wo_NHD, x_BTD.dtype), ("batch", T, "heads", None)
        if bound is None:
            y_BTD = project("BTNH,NHD->BTD", o_BTNH, wo_NHD, out=stream)
        else:
            y_BTD = fp8.product(o_BTNH, wo_NHD, fp8.largest(o_BTNH), stream)
        y_BTD = add("wo", y_BTD, "BTNH,NHD->BTD", o_BTNH, x_axes=heads, out=stream)
        if self.bias:
            y_BTD += self.wo_bias_D[...][None, None]
        return y_BTD, result


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
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Apply the layer; arguments and results as for `Attention`.

        Args:
          x_BTD: residual stream.
          rope: as for `Attention`.
          attend: as for `Attention`.
          layer_cache: as for `Attention`.
          dropout: as for `Attention`.
          matmul: as in `models.execution.Execution`.
        """

        def norm(x_BTD, weight_D):
            bound = fp8.norm_bound(weight_D) if matmul == "fp8" else None
            return rms_norm(x_BTD, weight_D, eps=self.eps), bound

        with jax.named_scope("attention"):
            normed_BTD, bound = norm(x_BTD, self.attention_norm_D[...])
            y_BTD, result = self.attention(
                normed_BTD, rope, attend, layer_cache, dropout=dropout, bound=bound
            )
            x_BTD = checkpoint_name(x_BTD + y_BTD, "ffn_input")
        with jax.named_scope("ffn"):
            normed_BTD, bound = norm(x_BTD, self.ffn_norm_D[...])
            x_BTD += self.ffn(normed_BTD, dropout=dropout, bound=bound)
        return x_BTD, result


LINEAR = {
    "wqkv": ("attention", "wqkv_DKgH", 1),
    "wo": ("attention", "wo_NHD", 2),
    "w1": ("ffn", "w1_DF", 1),
    "w3": ("ffn", "w3_DF", 1),
    "w2": ("ffn", "w2_FD", 1),
}
"""Linear layers of a block by LoRA target: module, parameter, number of input axes."""


def quantize_block(block: Block, kind: Literal["nf4", "int8"]) -> Block:
    """Replace the weights of a block's linear layers by quantised ones; return the block.

    Raises:
      ValueError: nf4, and an input axis is not a multiple of 64.
    """
    for module, name, inputs in LINEAR.values():
        owner = getattr(block, module)
        param = getattr(owner, name)
        setattr(owner, name, param.replace(quantize(param.get_value(), kind, inputs=inputs)))
    return block
