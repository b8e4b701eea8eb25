"""The arithmetic on score tiles in registers, shared by the kernels: masking, online softmax.

Scores live in registers in wgmma's accumulator layout; a value per row of the tile has the
layout `ROW`, a value per column `COL`.
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
# Start of the running maximum. Finite, not -inf: a row that has seen nothing yet computes
# exp2(-inf - M_START) = 0 for its hidden scores, where -inf - -inf would be NaN.
M_START = -1e30
# How far a row's maximum may rise, in powers of two, before what is accumulated is scaled down.
SLACK = 8.0
# How far above 1 a row's sum may end, in powers of two, with an offset that stays. fp32 and bf16
# reach to 2**127; what is left is for the values.
REACH = 64.0
# Columns of a row's sum: of each 8 neighbouring columns a thread holds the same 2.
PARTS = 8


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
    exp2 for each score. The offset m follows the row's maximum only when that has risen by more
    than `SLACK`: p then grows to 2**SLACK at most, which its floating-point types hold as exactly
    as 1, and alpha is 1 in nearly all tiles but a row's first.

    Args:
      s: scores [rows, columns], fp32, unscaled; -inf where hidden.
      m: offset of the exponents [rows], from M_START.
      l: running sum of exp2(s' - m) [rows, PARTS], from 0: each thread keeps the part of a row's
        sum that is made of its own columns, and nobody adds parts before the last tile.
      scale: the attention's scale, above 0.

    Returns:
      (p = exp2(s' - new m), new l, new m, alpha): what was accumulated before must be multiplied
      by alpha.

    References:
      Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135, alg. 1.
      Leaving small rises of the maximum alone: FlashAttention-4 (for Blackwell).
    """
    top = s.max(axis=1) * (scale * LOG2E)
    m_new = jnp.where(top - m > SLACK, top, m)
    alpha = jnp.exp2(m - m_new)
    p, l = offset_softmax(s, m_new, l * by_row(alpha, l.shape), scale)
    return p, l, m_new, alpha


def first_offset(s, m, scale: float):
    """The offset of rows in the first tile in which they see a key: their maximum there.

    Args:
      s: scores [rows, columns], as for `online_softmax`.
      m: offsets so far [rows]; M_START for rows that have seen nothing.
      scale: likewise.
    """
    top = jnp.maximum(s.max(axis=1) * (scale * LOG2E), M_START)
    return jnp.where(m == M_START, top, m)


def offset_softmax(s, m, l, scale: float):
    """`online_softmax` with an offset that stays: no maximum, nothing to scale down.

    As exact where the sum of a row ends below 2**REACH: p, its sum and what is accumulated with it
    are floating-point numbers with 8 bits of exponent, and only their ratios count. Which rows
    that holds for is known afterwards, from l (`flag`).

    Args:
      s: scores [rows, columns], as for `online_softmax`.
      m: offset of the exponents [rows], as `first_offset` gives it; finite.
      l: running sum [rows, PARTS], likewise.
      scale: likewise.

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


def flag(flags, places, l):
    """Sets flags to 1 where a row's sum with `offset_softmax` is out of reach, or NaN.

    Each thread looks at its own two rows, so that nobody waits for a reduction.

    Args:
      flags: ref int32 [...] in shared memory.
      places: indices into it.
      l: sums of rows, fp32 [rows], in the layout ROW.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROW, *[plgpu.Layout.WG_SPLAT] * len(places)))
    def store(_, flags: Any, l: Any, *places: Any) -> None:
        bound = arith.constant(ir.F32Type.get(), 2.0**REACH)
        wrong = [
            arith.cmpf(arith.CmpFPredicate.UGT, vector.extract(value, [], [0]), bound)
            for value in l.registers.flat
        ]  # an unordered comparison: true for NaN
        branch: Any = scf.IfOp(functools.reduce(arith.ori, wrong))
        with ir.InsertionPoint(branch.then_block):
            one = arith.constant(ir.IntegerType.get_signless(32), 1)
            for place in places:
                index = arith.index_cast(ir.IndexType.get(), place.registers.item())
                memref.store(one, flags, [index])
            scf.yield_([])

    store(flags, l, *places)  # pyright: ignore[reportCallIssue]  (its context comes from Pallas)


def rescale(x, alpha):
    """Multiplies rows by alpha; each warp whose alphas are all 1 passes over it.

    Pallas branches for whole warpgroups, and to know that no row of 64 needs it takes a trip
    through shared memory. Here each thread asks for its own two rows, and a warp passes over the
    products where none of its threads wants them.

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
