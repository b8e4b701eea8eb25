"""The arithmetic on score tiles in registers, shared by the kernels: masking, online softmax.

Scores live in registers in wgmma's accumulator layout; a value per row of the tile has the
layout `ROW`, a value per column `COL`.
"""

import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)
TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COL = plgpu.Layout.WGMMA.reduce(0)
# Start of the running maximum. Finite, not -inf: a row that has seen nothing yet computes
# exp2(-inf - M_START) = 0 for its hidden scores, where -inf - -inf would be NaN.
M_START = -1e30


def by_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value per row, for every column of its row."""
    return lax.broadcast_in_dim(x, shape, [0])


def by_col(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A value per column, for every row of its column."""
    return lax.broadcast_in_dim(x, shape, [1])


def mask_scores(s, start, ends, *, below, above, ids=None):
    """Sets the scores that the mask hides to -inf.

    Each test is a branch of its own: most tiles need none, those at an end of a range only one,
    and the values for the tests are loaded there, so that the main path has no register for them.

    Args:
      s: scores [rows, columns].
      start: column index of the tile's first column.
      ends: ref [2, rows] in shared memory: first and last visible column of each row.
      below: whether the tile may hold columns before some row's first, or ids decide.
      above: whether it may hold columns behind some row's last.
      ids: None, or (whether ids decide, ref [rows], ref [columns] to the ids in global memory).
    """

    def cols():
        return plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=TILE)

    def end(i):
        return by_row(plgpu.load(ends.at[i], layout=ROW) - start, s.shape)

    def same_id(s, rows, columns):
        row_ids = plgpu.load(rows, layout=ROW, optimized=False)
        col_ids = plgpu.load(columns, layout=COL, optimized=False)
        return jnp.where(by_row(row_ids, s.shape) == by_col(col_ids, s.shape), s, -jnp.inf)

    def not_below(s):
        s = jnp.where(cols() >= end(0), s, -jnp.inf)
        if ids is None:
            return s
        ids_decide, rows, columns = ids
        return lax.cond(ids_decide == 1, lambda s: same_id(s, rows, columns), lambda s: s, s)

    def not_above(s):
        return jnp.where(cols() <= end(1), s, -jnp.inf)

    s = lax.cond(below, not_below, lambda s: s, s)
    return lax.cond(above, not_above, lambda s: s, s)


def online_softmax(s, m, l, scale: float):
    """One step of the softmax over a row whose scores arrive in tiles.

    With s' = scale * log2(e) * s, powers of two replace exponentials: one multiply-add and one
    exp2 for each score.

    Args:
      s: scores [rows, columns], fp32, unscaled; -inf where hidden.
      m: running maximum of s' [rows], from M_START.
      l: running sum of exp2(s' - m) [rows], from 0.
      scale: the attention's scale, above 0.

    Returns:
      (p = exp2(s' - new m), new m, new l, alpha): what was accumulated before must be multiplied
      by alpha.

    References:
      Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135, alg. 1.
    """
    m_new = jnp.maximum(m, s.max(axis=1) * (scale * LOG2E))
    alpha = jnp.exp2(m - m_new)
    p = jnp.exp2(s * (scale * LOG2E) - by_row(m_new, s.shape))
    return p, m_new, l * alpha + p.sum(axis=1), alpha
