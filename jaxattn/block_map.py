"""The work that a mask leaves for a tiled kernel: which column tiles each row tile must visit.

"Rows" are the tokens that a program of the kernel owns (queries in the forward pass, keys in the
backward pass), "columns" those it walks over. Batch rows are laid end to end: the kernels see one
axis of B * T rows and one of B * S columns, and a mask that never reaches across.

Every row of a tile sees columns within one range, so a tile's work is a range of column tiles, and
its metadata is O(rows / tile). The ranges bound the work; the truth inside a tile is the row's own
range where documents are contiguous (`by_id` is 0), else the comparison of ids (`by_id` is 1).
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxattn.mask import Mask

# Above every column index, and still far from overflow when tile sizes are added to it.
NEVER = 1 << 30
# Tiles start at multiples of this: the copy engine wants 16-byte aligned, 8-row aligned boxes.
ALIGN = 8

# Fields of `BlockMap.work`.
TILE, START, COUNT, BY_ID, LIVE_FROM, LIVE_TO, FULL_FROM, FULL_TO = range(8)


# jax rebuilds it with placeholders in place of arrays, which type checkers must let pass.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMap:
    """Work list of one kernel, longest row tile first.

    Attributes:
      work: int32 [tiles, groups, 8]. The same for all groups: TILE, which row tile; START, its
        first column, a multiple of ALIGN; COUNT, how many column tiles follow from there; BY_ID,
        1 if ids decide inside. For each group of rows, in column tiles after START: live tiles
        are LIVE_FROM .. LIVE_TO - 1; a tile below FULL_FROM may hold columns before some row's
        range, a tile at or above FULL_TO may hold columns behind it; the others need no masking.
      ends: int32 [tiles, groups, 2, rows], in the same order: first and last visible column of
        each row; (NEVER, -1) for a row that sees nothing.
      row_ids: segment id of each row, int32 [tiles, groups, rows]; None if the mask has no
        documents.
      col_ids: segment id of each column, int32 [columns + padding]; None likewise.
    """

    work: Int[Array, "tiles groups 8"]
    ends: Int[Array, "tiles groups 2 rows"]
    row_ids: Int[Array, "tiles groups rows"] | None
    col_ids: Int[Array, " columns"] | None


def query_map(
    mask: Mask, batch: int, t: int, s: int, *, group: int, groups: int, tile: int, repeat: int
) -> BlockMap:
    """Work of a kernel whose programs own queries and walk over keys (forward).

    Args:
      mask: the mask, concrete or traced.
      batch: rows of the batch.
      t: queries in a row.
      s: keys in a row.
      group: queries in a group; a row tile is `groups` groups of neighbours.
      groups: groups of rows in a tile, each with its own live range (one a warpgroup).
      tile: keys in a column tile.
      repeat: times that a group's rows appear, one after another (query heads sharing a tile).
    """
    after = 0 if mask.causal else None if mask.window is None else mask.window - 1
    before = None if mask.window is None else mask.window - 1
    ids = (mask.segment_ids, mask.key_ids)
    return _block_map(*ids, batch, t, s, before, after, group, groups, tile, repeat)


def key_map(
    mask: Mask, batch: int, t: int, s: int, *, group: int, groups: int, tile: int
) -> BlockMap:
    """Work of a kernel whose programs own keys and walk over queries: the transpose (backward).

    Args: as `query_map`, with queries and keys exchanged.
    """
    before = 0 if mask.causal else None if mask.window is None else mask.window - 1
    after = None if mask.window is None else mask.window - 1
    ids = (mask.key_ids, mask.segment_ids)
    return _block_map(*ids, batch, s, t, before, after, group, groups, tile, 1)


def _block_map(
    row_ids, col_ids, batch, rows, cols, before, after, group, groups, tile, repeat
) -> BlockMap:
    first, last, by_range = _visible_ranges(row_ids, col_ids, batch, rows, cols, before, after)
    tiles = -(-batch * rows // (group * groups))

    def tiled(x: Array, fill: int) -> Array:
        x = jnp.pad(x, (0, tiles * group * groups - x.size), constant_values=fill)
        return x.reshape(tiles, groups, group)

    first, last = tiled(first, NEVER), tiled(last, -1)
    by_id = ~tiled(by_range.astype(jnp.int32), 1).astype(bool).all(axis=(1, 2))
    start = first.min(axis=(1, 2)) // ALIGN * ALIGN
    start = jnp.where(start < NEVER, start, 0)
    # At least one tile everywhere, also where nothing is visible: it is then masked as a whole,
    # and the kernels need no special case.
    count = jnp.maximum(_tiles_up_to(last.max(axis=(1, 2)) + 1 - start, tile), 1)
    begin = start[:, None]
    live_from = jnp.minimum((first.min(axis=2) - begin) // tile, count[:, None] - 1)
    live_to = jnp.maximum(_tiles_up_to(last.max(axis=2) + 1 - begin, tile), live_from + 1)
    full_from = jnp.clip(_tiles_up_to(first.max(axis=2) - begin, tile), live_from, live_to)
    full_from = jnp.where(by_id[:, None], live_to, full_from)  # ids are compared where not full
    full_to = jnp.clip((last.min(axis=2) + 1 - begin) // tile, live_from, live_to)
    shared = [jnp.arange(tiles), start, count, by_id.astype(jnp.int32)]
    fields = [jnp.broadcast_to(x[:, None], (tiles, groups)) for x in shared]
    fields += [live_from, live_to, full_from, full_to]
    work = jnp.stack(fields, axis=2).astype(jnp.int32)
    ends = jnp.stack([first, last], axis=2)

    order = jnp.argsort(-count, stable=True)

    def repeated(x: Array) -> Array:
        return jnp.concatenate([x[order]] * repeat, axis=-1)

    if row_ids is not None:
        row_ids = repeated(tiled(row_ids.reshape(-1).astype(jnp.int32), 0))
        # Padded so that the last column tile, wherever it starts, reads inside the array.
        col_ids = jnp.pad(col_ids.reshape(-1).astype(jnp.int32), (0, tile))
    return BlockMap(work=work[order], ends=repeated(ends), row_ids=row_ids, col_ids=col_ids)


def _visible_ranges(
    row_ids: Int[Array, "B rows"] | None,
    col_ids: Int[Array, "B cols"] | None,
    batch: int,
    rows: int,
    cols: int,
    before: int | None,
    after: int | None,
) -> tuple[Int[Array, " R"], Int[Array, " R"], Bool[Array, " R"]]:
    """First and last visible column of every row, and whether all between are visible.

    Row i of a batch row sees columns i - before .. i + after of its document. Columns count from
    the start of the batch (B * cols in all).
    """
    i = jnp.arange(rows, dtype=jnp.int32)[None]
    first = jnp.zeros((batch, rows), jnp.int32)
    last = jnp.full((batch, rows), cols - 1, jnp.int32)
    by_range = jnp.ones((batch, rows), bool)
    if row_ids is not None and col_ids is not None:
        first, last, by_range = jax.vmap(_document_ranges)(row_ids, col_ids)
    if before is not None:
        first = jnp.maximum(first, i - before)
    if after is not None:
        last = jnp.minimum(last, i + after)
    sees_none = first > last
    offset = jnp.arange(batch, dtype=jnp.int32)[:, None] * cols
    first = jnp.where(sees_none, NEVER, first + offset)
    last = jnp.where(sees_none, -1, last + offset)
    return first.reshape(-1), last.reshape(-1), by_range.reshape(-1)


def _document_ranges(row_ids, col_ids):
    """First and last column with the row's id; whether the id's columns are contiguous.

    By sorting, so that any ids in any order are right, in O(n log n) work and O(n) memory.
    """
    order = jnp.argsort(col_ids, stable=True).astype(jnp.int32)
    sorted_ids = col_ids[order]
    begin = jnp.searchsorted(sorted_ids, row_ids, side="left").astype(jnp.int32)
    end = jnp.searchsorted(sorted_ids, row_ids, side="right").astype(jnp.int32)
    found = (end > begin) & (row_ids != 0)
    first = jnp.where(found, order[jnp.minimum(begin, col_ids.size - 1)], NEVER)
    last = jnp.where(found, order[jnp.maximum(end - 1, 0)], -1)
    return first, last, ~found | (last - first == end - begin - 1)


def _tiles_up_to(columns, tile: int):
    """Column tiles that cover this many columns; none for a negative number."""
    return jnp.maximum(-(-columns // tile), 0)
