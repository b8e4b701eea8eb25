"""Decoding attention: one new query per row over the cached keys.

B batch, S cache slots, N query heads, K kv heads, G = N / K, H head dim, C blocks of slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn.eager import MASKED

# Slots per block. A row has few heads: blocks of slots that are reduced separately keep the whole
# GPU reading.
BLOCK = 512

Shape = tuple[int, ...]


def attend_cached(
    q_BNH: Float[Array, "B N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    filled_BS: Int[Array, "B S"],
    *,
    scale: float | None = None,
) -> Float[Array, "B N H"]:
    """Attend from one query per row to every filled slot of the cache.

    Keys and values are read once for all query heads of a group, and never copied; scores and sums
    are fp32. Under an explicit mesh batch and heads may be sharded, slots may not.

    Args:
      q_BNH: one query per row.
      k_BKSH: keys; heads before slots, so that the slots of a head are contiguous.
      v_BKSH: values, same shape and dtype as the keys.
      filled_BS: 1 where a slot is filled; at least one per row. With more than twice `BLOCK` slots,
        a multiple of `BLOCK` is fastest.
      scale: factor on the scores; None: 1 / sqrt(H).

    Returns:
      [B, N, H] in the dtype of q.

    Raises:
      ValueError: the shapes contradict each other.

    References:
      Dao et al. 2023, "Flash-Decoding for long-context inference" (blocks of keys).
    """
    _check_shapes(q_BNH.shape, k_BKSH.shape, v_BKSH.shape, filled_BS.shape)
    B, K, S, H = k_BKSH.shape
    factor = float(H) ** -0.5 if scale is None else scale
    q_BKGH = q_BNH.reshape(B, K, -1, H)
    s_BKGS = factor * jnp.einsum(
        "BKGH,BKSH->BKGS", q_BKGH, k_BKSH, preferred_element_type=jnp.float32
    )
    s_BKGS = jnp.where(filled_BS[:, None, None] > 0, s_BKGS, MASKED)
    C = S // BLOCK if S % BLOCK == 0 else 1
    s_BKGCs = s_BKGS.reshape(*s_BKGS.shape[:-1], C, S // C)
    m_BKGC = s_BKGCs.max(axis=-1)
    p_BKGCs = jnp.exp(s_BKGCs - m_BKGC[..., None])
    o_BKCGH = jnp.einsum(  # C before G: XLA's CPU client cannot run the other order in bf16
        "BKGCs,BKCsH->BKCGH",
        p_BKGCs.astype(v_BKSH.dtype),
        v_BKSH.reshape(B, K, C, S // C, H),
        preferred_element_type=jnp.float32,
    )
    # The sums of a block without a filled slot are meaningless; its weight is exp(-1e30 - m) = 0.
    weight_BKGC = jnp.exp(m_BKGC - m_BKGC.max(axis=-1, keepdims=True))
    l_BKG = (weight_BKGC * p_BKGCs.sum(axis=-1)).sum(axis=-1)
    o_BKGH = (weight_BKGC.swapaxes(2, 3)[..., None] * o_BKCGH).sum(axis=2) / l_BKG[..., None]
    return o_BKGH.reshape(q_BNH.shape).astype(q_BNH.dtype)


def _check_shapes(q: Shape, k: Shape, v: Shape, filled: Shape) -> None:
    if len(q) != 3 or len(k) != 4:
        raise ValueError(
            f"q {q} must have 3 axes: batch, head, dim; k {k} 4: batch, head, slot, dim"
        )
    if 0 in (*q, *k):
        raise ValueError(f"q {q} and k {k} must have no empty axis")
    if v != k:
        raise ValueError(f"v has shape {v}, must be k's {k}")
    if (q[0], q[2]) != (k[0], k[3]):
        raise ValueError(f"q {q} and k {k} must agree in batch and head dim")
    if q[1] % k[1]:
        raise ValueError(f"{q[1]} query heads must be a multiple of {k[1]} kv heads")
    if filled != (k[0], k[2]):
        raise ValueError(f"filled has shape {filled}, must be {(k[0], k[2])}")
