"""Reference attention by the formula of the paper, with the whole score matrix in memory.

B batch, T query pos, S key pos, N query heads, K kv heads, G = N / K, H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.mask import Mask

# Score of hidden pairs. Finite, not -inf: the softmax of a row that sees nothing must not be NaN
# before the row is set to 0. Scaled scores must be above it, or a row would see hidden keys.
MASKED = -1e30


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Compute softmax(scale * q k^T + mask) v by two einsums and an fp32 softmax.

    Products accumulate in fp32; the probabilities are rounded to the input dtype before the
    second product, as the original model does.

    Memory: B * N * T * S scores, in fp32 and more than once under differentiation; see
    `score_bytes`. K and V are not repeated: the query heads of a group are an einsum axis. Args and
    Returns: see `jaxattn.attention`.

    References:
      Vaswani et al. 2017, arXiv:1706.03762, eq. 1; InternLM2 modeling_internlm2.py,
      InternLM2Attention.forward.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    s_BKGTS = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    visible_BTS = mask.visible(T, S)
    s_BKGTS = jnp.where(visible_BTS[:, None, None], s_BKGTS, MASKED)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1)
    o_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        p_BKGTS.astype(v_BSKH.dtype),
        v_BSKH,
        preferred_element_type=jnp.float32,
    )
    sees_any_BT = visible_BTS.any(axis=-1)[:, :, None, None, None]
    o_BTKGH = jnp.where(sees_any_BT, o_BTKGH, 0.0)
    o_BTNH = o_BTKGH.astype(q_BTNH.dtype).reshape(B, T, N, H)
    if not return_lse:
        return o_BTNH
    lse_BTKG = jnp.moveaxis(jax.nn.logsumexp(s_BKGTS, axis=-1), 3, 1)
    lse_BTKG = jnp.where(visible_BTS.any(axis=-1)[:, :, None, None], lse_BTKG, -jnp.inf)
    return o_BTNH, lse_BTKG.reshape(B, T, N)


def score_bytes(batch: int, t: int, s: int, num_heads: int) -> int:
    """Return the bytes that one differentiated call needs for scores.

    Three fp32 arrays [B, N, T, S] are live at the peak of the backward pass: the probabilities,
    their gradient and the gradient of the scores. On a CPU XLA needs up to half as much again.
    """
    return 3 * 4 * batch * num_heads * t * s
