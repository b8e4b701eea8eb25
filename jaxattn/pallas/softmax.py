"""Arithmetic on score tiles in registers, shared by the kernels: masking, online softmax.

Scores are in registers in wgmma's accumulator layout; a value per row of the tile has the layout
`ROW`, a value per column `COL`.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, scf, vector

LOG2E = math.log2(math.e)
TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COL = plgpu.Layout.WGMMA.reduce(0)
# Initial value of the running maximum. Finite, not -inf: a row that has seen nothing yet computes
# exp2(-inf - M_START) = 0 for its hidden scores, where -inf - -inf would be NaN.
M_START = -1e30
# A row is rescaled after its maximum has risen by more than this, in powers of two.
SLACK = 8.0
# Largest row sum with a constant offset, in powers of two. fp32 and bf16 reach 2**127; the rest is
# left for the values.
REACH = 64.0
# Columns of a row's partial sums: of each 8 neighboring columns a thread holds the same 2.
PARTS = 8


def by_row(x: jax.Array, shape: tuple[int, ...], layout: Any = None) -> jax.Array:
    """Broadcast a value per row to the columns of a tile (layout None: TILE)."""
    x = lax.broadcast_in_dim(x, shape, [0])
    return x if layout is None else plgpu.layout_cast(x, layout)


def by_col(x: jax.Array, shape: tuple[int, ...], layout: Any = None) -> jax.Array:
    """Broadcast a value per column to the rows of a tile (layout None: TILE)."""
    x = lax.broadcast_in_dim(x, shape, [1])
    return x if layout is None else plgpu.layout_cast(x, layout)


def mask_scores(s, start, row_bounds, *, below, above, ids=None, layout: Any = None):
    """Set the scores that the mask hides to -inf.

    Each test is a separate branch: most tiles need none, tiles at one end of a range need one. The
    values for the tests are loaded in the branch, so that the main path has no registers for them.

    Args:
      s: scores [rows, columns].
      start: column index of the tile's first column.
      row_bounds: ref [2, rows] in shared memory: first and last visible column of each row.
      below: True if the tile may hold columns before a row's first, or if ids decide.
      above: True if the tile may hold columns after a row's last.
      ids: None, or (BY_ID, ref [rows], ref [columns] to the segment ids in global memory).
      layout: layout of the scores; None: TILE.
    """
    tile: Any = TILE if layout is None else layout
    row, col = tile.reduce(1), tile.reduce(0)

    def cols():
        return plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=tile)

    def bound(i):
        return by_row(plgpu.load(row_bounds.at[i], layout=row) - start, s.shape, layout)

    def same_id(s, rows, columns):
        row_ids = plgpu.load(rows, layout=row, optimized=False)
        col_ids = plgpu.load(columns, layout=col, optimized=False)
        same = by_row(row_ids, s.shape, layout) == by_col(col_ids, s.shape, layout)
        return jnp.where(same, s, -jnp.inf)

    def not_below(s):
        s = jnp.where(cols() >= bound(0), s, -jnp.inf)
        if ids is None:
            return s
        by_id, rows, columns = ids
        return lax.cond(by_id == 1, lambda s: same_id(s, rows, columns), lambda s: s, s)

    def not_above(s):
        return jnp.where(cols() <= bound(1), s, -jnp.inf)

    s = lax.cond(below, not_below, lambda s: s, s)
    return lax.cond(above, not_above, lambda s: s, s)


def online_softmax(s, m, l, scale: float):
    """Do one step of the online softmax over a row whose scores arrive in tiles.

    With s' = scale * log2(e) * s, powers of two replace exponentials: one multiply-add and one
    exp2 for each score. The offset m follows the row's maximum only when that has risen by more
    than `SLACK`: p then grows to 2**SLACK at most, which its floating-point types hold as exactly
    as 1, and alpha is 1 in nearly all tiles but a row's first.

    Args:
      s: scores [rows, columns], fp32, unscaled; -inf where hidden.
      m: offset of the exponents [rows], from M_START.
      l: running sum of exp2(s' - m) [rows, PARTS], from 0: each thread keeps the part of a row's
        sum over its own columns; the parts are added after the last tile.
      scale: factor on the scores, above 0.

    Returns:
      (p = exp2(s' - new m), new l, new m, alpha): the caller multiplies earlier sums by alpha.

    References:
      Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135, alg. 1.
      The rescaling threshold: FlashAttention-4 (for Blackwell).
    """
    top = s.max(axis=1) * (scale * LOG2E)
    m_new = jnp.where(top - m > SLACK, top, m)
    alpha = jnp.exp2(m - m_new)
    p, l = offset_softmax(s, m_new, l * by_row(alpha, l.shape), scale)
    return p, l, m_new, alpha


def first_offset(s, m, scale: float):
    """Return the offset of rows that see their first key in this tile: their maximum.

    Arguments as for `online_softmax`; m [rows] is M_START for rows that have seen nothing.
    """
    top = jnp.maximum(s.max(axis=1) * (scale * LOG2E), M_START)
    return jnp.where(m == M_START, top, m)


def offset_softmax(s, m, l, scale: float):
    """Do a step of `online_softmax` with a constant offset: no maximum, no rescaling.

    The result is as exact if the final sum of the row is below 2**REACH: p, its sum and O are
    floating-point numbers with 8 bits of exponent, and only their ratios count. `set_flags` finds
    the rows above this bound afterwards, from l.

    Arguments as for `online_softmax`; m [rows] is the finite offset from `first_offset`.

    Returns:
      (p = exp2(s' - m), new l).
    """
    p = jnp.exp2(s * (scale * LOG2E) - by_row(m, s.shape))
    sums = [
        lax.slice(p, (0, start), (p.shape[0], start + PARTS))
        for start in range(0, p.shape[1], PARTS)
    ]
    while len(sums) > 1:  # in pairs: short chains of additions
        odd = sums[len(sums) // 2 * 2 :]
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=False)] + odd
    return p, l + sums[0]


def set_flags(flags, indices, l):
    """Set flags to 1 if a row's sum from `offset_softmax` exceeds 2**REACH or is NaN.

    Each thread tests its own two rows, so that no thread waits for a reduction.

    Args:
      flags: ref int32 [...] in shared memory.
      indices: elements of `flags` to set.
      l: sums of rows, fp32 [rows], in the layout ROW.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROW, *[plgpu.Layout.WG_SPLAT] * len(indices)))
    def store(_, flags: Any, l: Any, *indices: Any) -> None:
        bound = arith.constant(ir.F32Type.get(), 2.0**REACH)
        overflows = [
            arith.cmpf(arith.CmpFPredicate.UGT, vector.extract(value, [], [0]), bound)
            for value in l.registers.flat
        ]  # an unordered comparison: true for NaN
        branch: Any = scf.IfOp(functools.reduce(arith.ori, overflows))
        with ir.InsertionPoint(branch.then_block):
            one = arith.constant(ir.IntegerType.get_signless(32), 1)
            for index in indices:
                element = arith.index_cast(ir.IndexType.get(), index.registers.item())
                memref.store(one, flags, [element])
            scf.yield_([])

    store(flags, l, *indices)  # pyright: ignore[reportCallIssue]  (its context comes from Pallas)


def rescale(x, alpha):
    """Multiply rows by alpha; a warp skips the products if all its alphas are 1.

    Pallas branches for whole warpgroups, and testing all 64 rows would need a reduction through
    shared memory. Here each thread tests its own two rows, and a warp skips the products if none of
    its threads needs them.

    Args:
      x: fp32 [rows, columns], in the layout TILE.
      alpha: fp32 [rows], in the layout ROW.
    """

    @plgpu.inline_mgpu(
        arg_types=(TILE, ROW),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=TILE),
    )
    def multiply(_, x: Any, alpha: Any) -> Any:
        one = arith.constant(ir.F32Type.get(), 1.0)
        changes = [
            arith.cmpf(arith.CmpFPredicate.UNE, vector.extract(value, [], [0]), one)
            for value in alpha.registers.flat
        ]
        registers = list(x.registers.flat)
        branch: Any = scf.IfOp(
            functools.reduce(arith.ori, changes), [r.type for r in registers], has_else=True
        )
        with ir.InsertionPoint(branch.then_block):
            product = x * alpha.broadcast_in_dim(x.shape, (0,), x.layout)
            scf.yield_(list(product.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(registers)
        results = np.empty(x.registers.shape, dtype=object)
        results.flat[:] = list(branch.results)
        return mgpu.FragmentedArray(_registers=results, _layout=x.layout, _is_signed=None)

    return multiply(x, alpha)  # pyright: ignore[reportCallIssue]  (its context comes from Pallas)
