"""One layer of the model: attention and SwiGLU, each after a norm and added to the stream.

B batch, T query pos, N query heads, K kv heads, G = N / K, g = G + 2, H head dim, D embed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from models import sharding
from models.config import ModelConfig
from models.layers import SwiGLU, constant, normal, rms_norm
from models.qkv import rotated_heads

# (q_BTNH, k_BTKH, v_BTKH, carried) -> (o_BTNH, result): how a block attends. `carried` is what the
# caller hands to this layer (its part of a cache), or None.
Attend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
Rope = tuple[Array, Array]


class Attention(nnx.Module):
    """Projections around attention; the attention itself is handed in.

    wqkv is fused as in HF: for each kv head its G query heads, then k, then v.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
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

    def __call__(
        self, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend, carried: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Projects, rotates, attends, projects back.

        Args:
          x_BTD: normed input; the weights must have its type.
          rope: cos, sin of `rope_table`.
          attend: see `Attend`.
          carried: handed to attend.

        Returns:
          The output [B, T, D] and whatever attend returned beside its own.
        """
        wqkv_DKgH = sharding.gathered(self.wqkv_DKgH[...], "embed", "heads", None, None)
        qkv_BTKgH = _project(
            "BTD,DKgH->BTKgH", x_BTD, wqkv_DKgH, out=("batch", None, "heads", None, None)
        )
        if self.bias:
            qkv_BTKgH += self.wqkv_bias_KgH[...][None, None]
        q_BTNH, k_BTKH, v_BTKH = checkpoint_name(rotated_heads(qkv_BTKgH, *rope), "qkv")

        o_BTNH, result = attend(q_BTNH, k_BTKH, v_BTKH, carried)

        wo_NHD = sharding.gathered(self.wo_NHD[...], "heads", None, "embed")
        y_BTD = _project("BTNH,NHD->BTD", o_BTNH, wo_NHD, out=("batch", None, None))
        if self.bias:
            y_BTD += self.wo_bias_D[...][None, None]
        return y_BTD, result


class Block(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype=jnp.float32):
        D = config.hidden_size
        self.eps = config.rms_norm_eps
        self.attention_norm_D = constant(1.0, (D,), (None,), param_dtype)
        self.attention = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.ffn_norm_D = constant(1.0, (D,), (None,), param_dtype)
        self.ffn = SwiGLU(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend, carried: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; arguments and results as `Attention`."""
        with jax.named_scope("attention"):
            normed_BTD = rms_norm(x_BTD, self.attention_norm_D[...], eps=self.eps)
            y_BTD, result = self.attention(normed_BTD, rope, attend, carried)
            x_BTD = checkpoint_name(x_BTD + y_BTD, "ffn_input")
        with jax.named_scope("ffn"):
            x_BTD += self.ffn(rms_norm(x_BTD, self.ffn_norm_D[...], eps=self.eps))
        return x_BTD, result


def _project(subscripts: str, x: Array, w: Array, *, out: sharding.Axes) -> Array:
    """`sharding.einsum`; of a single token as one of two equal ones.

    For one row XLA makes a matrix product of up to about 2^23 weights an elementwise one, which it
    writes to memory and then sums: three times the weights' bytes, which are all that a decoding
    step waits for (seen in the GPU compiler's output, jax 0.11.2, at 1.8B).
    """
    if x.shape[0] * x.shape[1] > 1:
        return sharding.einsum(subscripts, x, w, out=out)
    # The barriers keep the compiler from seeing that the rows are equal, and that one is dropped.
    two = jax.lax.optimization_barrier(jnp.concatenate([x, x], axis=1))
    return jax.lax.optimization_barrier(sharding.einsum(subscripts, two, w, out=out))[:, :1]
