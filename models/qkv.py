"""From the fused projection to rotated queries and keys, and values; its gradient in one pass.

B batch, T query pos, N query heads, K kv heads, G = N / K, g = G + 2, H head dim.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.layers import rotate


@jax.custom_vjp
def rotated_heads(
    qkv_BTKgH: Float[Array, "B T K g H"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Takes q, k and v apart and rotates q and k.

    Its gradient is written here, slot by slot into memory that is not filled first. Derived from
    the forward pass it is a sum of padded arrays, for which XLA on a GPU asks of every number
    which of q, k and v it comes from, and which half: 2.5 times as slow as the bytes need.

    Args:
      qkv_BTKgH: for each kv head its G query heads, then k, then v.
      cos: of `rope_table`.
      sin: likewise. No gradient is formed for the two.

    Returns:
      (q, k, v).
    """
    B, T, K, g, H = qkv_BTKgH.shape
    q_BTNH = rotate(qkv_BTKgH[:, :, :, :-2].reshape(B, T, K * (g - 2), H), cos, sin)
    return q_BTNH, rotate(qkv_BTKgH[:, :, :, -2], cos, sin), qkv_BTKgH[:, :, :, -1]


def _forward(qkv_BTKgH, cos, sin):
    return rotated_heads(qkv_BTKgH, cos, sin), (cos, sin)


def _backward(tables, gradients):
    dq_BTNH, dk_BTKH, dv_BTKH = gradients
    B, T, K, H = dk_BTKH.shape
    G = dq_BTNH.shape[2] // K
    dq_BTKGH = _rotate_back(dq_BTNH, *tables).reshape(B, T, K, G, H)
    dk_BTKH = _rotate_back(dk_BTKH, *tables)
    # v goes everywhere first: memory that is not written at all (lax.empty) XLA takes too early.
    shape = (B, T, K, G + 2, H)
    dqkv_BTKgH = jnp.broadcast_to(dv_BTKH[:, :, :, None], shape)
    dqkv_BTKgH = dqkv_BTKgH.at[:, :, :, G].set(dk_BTKH).at[:, :, :, :G].set(dq_BTKGH)
    return dqkv_BTKgH, None, None


rotated_heads.defvjp(_forward, _backward)


def _rotate_back(x_BTNH, cos, sin):
    """The inverse of `rotate`, from halves that are swapped, not joined.

    XLA writes the two halves of a concatenation in turn, but only where it is the last thing that
    a pass does; here the slots are.
    """
    halves = x_BTNH.reshape(*x_BTNH.shape[:-1], 2, -1).astype(jnp.float32)
    signed_sin = sin[..., None, :] * np.array([[1], [-1]], np.float32)[None, None, None]
    turned = halves * cos[..., None, :] + halves[..., ::-1, :] * signed_sin
    return turned.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
