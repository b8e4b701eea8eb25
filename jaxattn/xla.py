"""Attention of jax.nn by XLA, one slice of queries at a time: bounded memory on every device.

B batch, T query pos, S key pos, N query heads, K kv heads, H head dim, C queries in a slice.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.mask import Mask

# Largest fp32 scores of one slice, [B, N, C, S], in bytes: enough to fill a GPU, small against the
# weights.
SLICE_BYTES = 512 << 20


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Compute `jax.nn.dot_product_attention` over slices of queries, with the mask of each slice.

    Memory: arrays of one slice's scores, each at most about `SLICE_BYTES`: 2 in the forward pass, 3
    to 5 in the backward pass, which recomputes the scores of a slice, and up to 6 with the
    log-sum-exp; see `score_bytes`. Work: all pairs; hidden pairs are computed and discarded. The
    log-sum-exp takes one more product: jax.nn rounds its own to the dtype of the keys, and drops
    its gradient. Args and Returns: see `jaxattn.attention`.

    References:
      jax.nn.dot_product_attention; Rabe and Staats 2021, arXiv:2112.05682 (slicing).
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    size, count = slices(q_BTNH.shape[0], T, q_BTNH.shape[2], S)
    rest = size * count - T  # padding of the last slice; its output is dropped
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, rest), (0, 0), (0, 0)))
    if mask.segment_ids is not None:
        ids_BT = jnp.pad(mask.segment_ids, ((0, 0), (0, rest)))
        mask = dataclasses.replace(mask, segment_ids=ids_BT, kv_segment_ids=mask.key_ids)

    @jax.checkpoint  # keep only the inputs of the slices: their scores would be the T x S matrix
    def attend(start, q_BCNH):
        visible_BCS = mask.visible(T + rest, S, start=start, size=size)
        o_BCNH = jax.nn.dot_product_attention(
            q_BCNH, k_BSKH, v_BSKH, mask=visible_BCS[:, None], scale=scale, implementation="xla"
        )
        # jax.nn averages over all keys for a row that sees nothing; here its output is 0.
        sees_any_BC = visible_BCS.any(axis=-1)[:, :, None, None]
        o_BCNH = jnp.where(sees_any_BC, o_BCNH, jnp.zeros_like(o_BCNH))
        return (o_BCNH, _log_sum_exp(q_BCNH, k_BSKH, visible_BCS, scale)) if return_lse else o_BCNH

    q_slices = jnp.moveaxis(q_BTNH.reshape(q_BTNH.shape[0], count, size, *q_BTNH.shape[2:]), 1, 0)
    results = jax.lax.map(lambda x: attend(*x), (size * jnp.arange(count), q_slices))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], T + rest, *x.shape[3:])[:, :T], results
    )


def _log_sum_exp(
    q_BCNH: Float[Array, "B C N H"],
    k_BSKH: Float[Array, "B S K H"],
    visible_BCS: Bool[Array, "#B C S"],
    scale: float,
) -> Float[Array, "B C N"]:
    """Compute the log-sum-exp of the visible scaled scores of each query; -inf without any."""
    B, C, N, H = q_BCNH.shape
    K = k_BSKH.shape[2]
    q_BCKGH = q_BCNH.reshape(B, C, K, N // K, H)
    s_BCKGS = scale * jnp.einsum(
        "BCKGH,BSKH->BCKGS", q_BCKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    # A query that sees nothing sums over all keys first: the derivative of an empty sum is NaN in
    # forward mode.
    sees_any_BC1 = visible_BCS.any(axis=-1, keepdims=True)
    counted_BC11S = (visible_BCS | ~sees_any_BC1)[:, :, None, None]
    lse_BCN = jax.nn.logsumexp(s_BCKGS, axis=-1, where=counted_BC11S).reshape(B, C, N)
    return jnp.where(sees_any_BC1, lse_BCN, -jnp.inf)


def score_bytes(batch: int, t: int, s: int, num_heads: int) -> int:
    """Return the least bytes that one differentiated call needs for scores.

    Three fp32 arrays of one slice's scores; see `eager.score_bytes`.
    """
    size, _ = slices(batch, t, num_heads, s)
    return 3 * 4 * batch * num_heads * size * s


def slices(batch: int, t: int, num_heads: int, s: int) -> tuple[int, int]:
    """Return (queries in a slice, number of slices): the fewest slices within `SLICE_BYTES`."""
    most = max(1, SLICE_BYTES // (4 * batch * num_heads * s))
    count = -(-t // most)
    return -(-t // count), count
