"""Split of the fused qkv projection and rotary embedding, with a hand-written gradient.

B batch, T query pos, N query heads, K kv heads, G = N / K, g = G + 2, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.layers import rotate


@jax.custom_vjp
def split_qkv_and_rope(
    qkv_BTKgH: Float[Array, "B T K g H"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Split the fused projection into q, k, v and apply rotary embedding to q and k.

    The gradient is written by hand: each slot is set once, in memory that is not zeroed first. The
    gradient that JAX derives is a sum of padded arrays, for which XLA on a GPU decides for every
    number which of q, k and v, and which half, it comes from: 2.5 times the time that moving the
    bytes takes (jax 0.11.2).

    Args:
      qkv_BTKgH: for each kv head its G query heads, then k, then v.
      cos: from `rope_table`, fp32; gets no gradient.
      sin: from `rope_table`, fp32; gets no gradient.

    Returns:
      (q, k, v) in the dtype of qkv_BTKgH.
    """
    B, T, K, g, H = qkv_BTKgH.shape
    q_BTNH = rotate(qkv_BTKgH[:, :, :, :-2].reshape(B, T, K * (g - 2), H), cos, sin)
    return q_BTNH, rotate(qkv_BTKgH[:, :, :, -2], cos, sin), qkv_BTKgH[:, :, :, -1]


def _forward(qkv_BTKgH, cos, sin):
    return split_qkv_and_rope(qkv_BTKgH, cos, sin), (cos, sin)


def _backward(tables, gradients):
    dq_BTNH, dk_BTKH, dv_BTKH = gradients
    B, T, K, H = dk_BTKH.shape
    G = dq_BTNH.shape[2] // K
    dq_BTKGH = _rotate_back(dq_BTNH, *tables).reshape(B, T, K, G, H)
    dk_BTKH = _rotate_back(dk_BTKH, *tables)
    # Broadcast v to every slot first: XLA allocates unwritten memory (lax.empty) too early.
    shape = (B, T, K, G + 2, H)
    dqkv_BTKgH = jnp.broadcast_to(dv_BTKH[:, :, :, None], shape)
    dqkv_BTKgH = dqkv_BTKgH.at[:, :, :, G].set(dk_BTKH).at[:, :, :, :G].set(dq_BTKGH)
    return dqkv_BTKgH, None, None


split_qkv_and_rope.defvjp(_forward, _backward)


def _rotate_back(x_BTNH, cos, sin):
    """Apply the inverse of `rotate`, with swapped halves instead of a concatenation.

    XLA writes the two halves of a concatenation directly only if it is the last operation of a
    fusion; here the update of the slots is.
    """
    halves = x_BTNH.reshape(*x_BTNH.shape[:-1], 2, -1).astype(jnp.float32)
    signed_sin = sin[..., None, :] * np.array([[1], [-1]], np.float32)[None, None, None]
    turned = halves * cos[..., None, :] + halves[..., ::-1, :] * signed_sin
    return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
