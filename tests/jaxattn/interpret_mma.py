"""Interpret the per-thread operations of the mma.sync kernels as formulas on whole tiles.

Copies are complete when they are started, so a missing `wait` or `barrier` is invisible here, and
layouts of registers are: `-m gpu` shows those. One warpgroup only, because the stand-in for
`cp_async.barrier` does nothing.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from jaxattn.pallas.mma import cp_async, fragments, row_access


def patches() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement)."""
    return [
        (cp_async, "copy_rows", copy_rows),
        (cp_async, "store_rows", store_rows),
        (cp_async, "copy_numbers", copy_numbers),
        (cp_async, "commit", lambda: None),
        (cp_async, "wait", lambda groups: None),
        (cp_async, "barrier", barrier),
        (cp_async, "pair_barrier", lambda: None),
        (fragments, "load_factor", load_factor),
        (fragments, "add_product_of_pair", add_product_of_pair),
        (fragments, "as_left_factor", lambda x: x),
        (fragments, "store_product", store_product),
        (row_access, "load_by_row", load_by_row),
        (row_access, "store_by_row", store_by_row),
        (row_access, "add_rows", add_rows),
    ]


def copy_rows(source, target, row, head, *, heads=1, warpgroups=1):
    """Rows beyond the end are other finite rows: the last eight."""

    def move(rows, head, tile_rows):
        start = jnp.minimum(rows.start, source.shape[0] - rows.size)
        target[tile_rows] = source[pl.ds(start, rows.size), head]

    _for_parts(source, target.shape[0], row, head, heads, move)


def store_rows(source, target, row, head, *, heads=1, warpgroups=1):
    def move(rows, head, tile_rows):
        @pl.when(rows.start + rows.size <= target.shape[0])
        def _():
            target[rows, head] = source[tile_rows]

    _for_parts(target, source.shape[0], row, head, heads, move)


def _for_parts(memory, tile_rows, row, head, heads, move):
    """Call move for the rows of each head, as a whole where they exist, else eight at a time."""
    of_head = tile_rows // heads

    def whole():
        for h in range(heads):
            move(pl.ds(row, of_head), head + h, pl.ds(h * of_head, of_head))

    def by_eight():
        for h in range(heads):
            for i in range(0, of_head, 8):
                move(pl.ds(row + i, 8), head + h, pl.ds(h * of_head + i, 8))

    lax.cond(row + of_head <= memory.shape[0], whole, by_eight)


def copy_numbers(source, target, start):
    target[...] = source[pl.ds(start, target.shape[0])]


def barrier(warpgroups=1):
    assert warpgroups == 1, "the interpreter's stand-in orders nothing"


def load_factor(ref, k, *, side, along, warpgroups=1, m_warps=4):
    part = ref[:, pl.ds(16 * k, 16)] if along == "columns" else ref[pl.ds(16 * k, 16), :].T
    return part if side == "left" else part.T


def add_product_of_pair(sums, value, left, right):
    """As one warp would that has all columns: half from registers, half from shared memory."""
    half = value.shape[1] // 2
    known = jnp.concatenate([value[:, :half], left[:, half:]], axis=1)
    return sums + jnp.dot(known, right[...], preferred_element_type=jnp.float32)


def store_product(ref, value, m_warps):
    ref[...] = value


def load_by_row(source, token, head, *, rows, heads):
    part = pl.ds(token, rows // heads)
    return jnp.concatenate([source[head + h, part] for h in range(heads)])


def store_by_row(target, value, token, head, *, heads):
    size = value.shape[0] // heads
    for h in range(heads):
        target[head + h, pl.ds(token, size)] = value[h * size : (h + 1) * size]


def add_rows(target, value, token, head, *, dtype, m_warps, vector, column=0, own=0):
    assert not own
    rows, columns = value.shape
    if vector:  # of 32 columns: warp, row, thread of a row, block of the warp, number
        blocks = value.reshape(rows // 8, 8, columns // 32, 2, 2, 4, 2)
        blocks = blocks.transpose(0, 2, 4, 1, 5, 3, 6)
    else:  # even columns of a block, then odd ones
        blocks = value.reshape(rows // 8, 8, columns // 8, 4, 2).transpose(0, 2, 4, 1, 3)
    at = pl.ds(lax.div(token, 8), rows // 8), head, pl.ds(8 * column, 8 * columns)
    target[at] = target[at] + blocks.reshape(rows // 8, 8 * columns)
