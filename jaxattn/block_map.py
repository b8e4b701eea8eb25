"""The work that a mask leaves for a tiled kernel: which column tiles each row tile must visit.

"Rows" are the tokens that a program of the kernel owns (queries in the forward pass, keys in the
backward pass), "columns" those it walks over. Batch rows are laid end to end: the kernels see one
axis of B * T rows and one of B * S columns, and a mask that never reaches across.

Every row of a tile sees columns within one range, so a tile's work is a range of column tiles, and
its metadata is O(rows / tile). The ranges bound the work; the truth inside a tile is the row's own
range where documents are contiguous (`by_id` is 0), else the comparison of ids (`by_id` is 1).

A block pattern cuts holes into the ranges. Then they are ranges of a list of the live column tiles
(`pattern.py`), which the kernels look up in `cols`, and batch rows count as padded to whole blocks.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxattn.block_pattern import live_tiles
from jaxattn.mask import BLOCK, Mask
from jaxattn.ranges import NEVER, visible_ranges

# Tiles start at multiples of this: the copy engine wants 16-byte aligned, 8-row aligned boxes.
ALIGN = 8

# Fields of `BlockMap.work`, and how many a row of it has: the copy engine wants multiples of four.
TILE, START, COUNT, COLUMNS, BY_ID, LIVE_FROM, LIVE_TO, LIVE_COLUMNS, FULL_FROM, FULL_TO = range(10)
FIELDS = 12


# jax rebuilds it with placeholders in place of arrays, which type checkers must let pass.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMap:
    """Work list of one kernel, longest row tile first.

    Attributes:
      work: int32 [tiles, groups, FIELDS]. The same for all groups: TILE, which row tile; START,
        its first column, a multiple of ALIGN, or with `cols` where in `cols` its first column
        stands; COUNT, how many column tiles follow from there; COLUMNS, how many of their columns
        there are up to the last that some row sees; BY_ID, 1 if ids decide inside. For each group
        of rows, in column tiles after START: live tiles are LIVE_FROM .. LIVE_TO - 1; a tile below
        FULL_FROM may hold columns before some row's range, or the first that some row sees; a tile
        at or above FULL_TO may hold columns behind it; the others need no masking. LIVE_COLUMNS is
        COLUMNS of the group.
      ends: int32 [tiles, groups, 2, rows], in the same order: first and last visible column of
        each row; (NEVER, -1) for a row that sees nothing.
      row_ids: segment id of each row, int32 [tiles, groups, rows]; None if the mask has no
        documents.
      col_ids: segment id of each column, int32 [columns + padding]; None likewise.
      cols: first columns of the tiles to visit, int32, one list for each row of the block pattern,
        end to end; None if the mask has no pattern: the tiles of a row are neighbours.
    """

    work: Int[Array, "tiles groups fields"]
    ends: Int[Array, "tiles groups 2 rows"]
    row_ids: Int[Array, "tiles groups rows"] | None
    col_ids: Int[Array, " columns"] | None
    cols: Int[Array, " lists"] | None


def stride(mask: Mask, length: int) -> int:
    """Tokens from one batch row of this length to the next, as the maps count them."""
    return length if mask.blocks is None else -(-length // BLOCK) * BLOCK


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

    Raises:
      NotImplementedError: the mask has a block pattern, and the tiles do not divide its blocks.
    """
    before = mask.reach(t, s)
    after = 0 if mask.causal else before
    ids = (mask.segment_ids, mask.key_ids)
    blocks = _blocks_of_batch(mask, batch)
    return _block_map(*ids, blocks, batch, t, s, before, after, group, groups, tile, repeat)


def key_map(
    mask: Mask, batch: int, t: int, s: int, *, group: int, groups: int, tile: int
) -> BlockMap:
    """Work of a kernel whose programs own keys and walk over queries: the transpose (backward).

    Args, Raises: as `query_map`, with queries and keys exchanged.
    """
    after = mask.reach(t, s)
    before = 0 if mask.causal else after
    ids = (mask.key_ids, mask.segment_ids)
    blocks = _blocks_of_batch(mask, batch)
    if blocks is not None:
        blocks = blocks.swapaxes(1, 2)
    return _block_map(*ids, blocks, batch, s, t, before, after, group, groups, tile, 1)


def _blocks_of_batch(mask: Mask, batch: int) -> Bool[Array, "B P Q"] | None:
    """The block pattern of each batch row."""
    blocks = mask.blocks
    return None if blocks is None else jnp.broadcast_to(blocks, (batch, *blocks.shape[-2:]))


def _block_map(
    row_ids, col_ids, blocks, batch, rows, cols, before, after, group, groups, tile, repeat
) -> BlockMap:
    first, last, by_range = visible_ranges(row_ids, col_ids, batch, rows, cols, before, after)
    # What the kernel walks over, from low to high: the columns, or the list of live ones.
    low, high, lists = first, last, None
    if blocks is not None:
        _check_tiles(group * groups, tile)
        lists = live_tiles(blocks, tile)
        low, high = lists.listed(first, last)
        rows, cols = (blocks.shape[i] * BLOCK for i in (1, 2))
    sees_none = low > high
    first_of_row = jnp.arange(batch, dtype=jnp.int32)[:, None] * cols
    first = jnp.where(sees_none, NEVER, first + first_of_row)
    last = jnp.where(sees_none, -1, last + first_of_row)
    if lists is None:
        low, high = first, last
    tiles = -(-batch * rows // (group * groups))

    def tiled(x: Array, fill: int) -> Array:
        x = _lengthened(x, rows, fill).reshape(-1)
        x = jnp.pad(x, (0, tiles * group * groups - x.size), constant_values=fill)
        return x.reshape(tiles, groups, group)

    sees_none, by_range = tiled(sees_none, True), tiled(by_range, True)
    work = _work(
        jnp.where(sees_none, NEVER, tiled(low, 0)),
        jnp.where(sees_none, -1, tiled(high, 0)),
        by_id=~by_range.all(axis=(1, 2)),
        tile=tile,
        align=ALIGN if lists is None else tile,
    )
    if lists is not None:  # one list after another; the rows of a tile have the same one
        first_in_list = jnp.arange(tiles) * group * groups // BLOCK * lists.cols_BPW.shape[2]
        place = first_in_list[:, None] + work[:, :, START] // tile
        work = work.at[:, :, START].set(place.astype(jnp.int32))
    ends = jnp.stack([tiled(first, NEVER), tiled(last, -1)], axis=2)
    order = jnp.argsort(-work[:, 0, COUNT], stable=True)

    def repeated(x: Array) -> Array:
        return jnp.concatenate([x[order]] * repeat, axis=-1)

    if row_ids is not None:
        row_ids = repeated(tiled(row_ids.astype(jnp.int32), 0))
        # Padded so that the last column tile, wherever it starts, reads inside the array.
        col_ids = _lengthened(col_ids.astype(jnp.int32), cols, 0).reshape(-1)
        col_ids = jnp.pad(col_ids, (0, tile))
    return BlockMap(
        work=work[order],
        ends=repeated(ends),
        row_ids=row_ids,
        col_ids=col_ids,
        cols=None if lists is None else (lists.cols_BPW + first_of_row[:, :, None]).reshape(-1),
    )


def _check_tiles(rows: int, cols: int) -> None:
    if BLOCK % rows or BLOCK % cols:
        raise NotImplementedError(
            f"blocks need tiles that divide {BLOCK}, these heads have {rows} x {cols} (see "
            "jaxattn/tuned.json); use impl='xla'"
        )


def _lengthened(x: Array, length: int, fill: int) -> Array:
    """A value per token, [B, tokens], with `fill` behind up to this length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=fill)


def _work(
    low: Int[Array, "tiles groups group"],
    high: Int[Array, "tiles groups group"],
    *,
    by_id: Bool[Array, " tiles"],
    tile: int,
    align: int,
) -> Int[Array, "tiles groups fields"]:
    """`BlockMap.work`, not yet sorted, of rows that see low .. high of what is walked over."""
    tiles, groups, _ = low.shape
    start = low.min(axis=(1, 2)) // align * align
    start = jnp.where(start < NEVER, start, 0)
    # At least one tile everywhere, also where nothing is visible: it is then masked as a whole,
    # and the kernels need no special case.
    begin = start[:, None]
    live_columns = jnp.maximum(high.max(axis=2) + 1 - begin, 1)
    columns = live_columns.max(axis=1)
    count = _tiles_up_to(columns, tile)
    live_from = jnp.minimum((low.min(axis=2) - begin) // tile, count[:, None] - 1)
    live_to = jnp.maximum(_tiles_up_to(live_columns, tile), live_from + 1)
    # The tile in which the last row begins is below it, even if the row begins with the tile: the
    # forward kernel looks there for rows that see their first key.
    before = low.max(axis=2) - begin
    full_from = jnp.where(before > 0, before // tile + 1, 0)
    full_from = jnp.clip(full_from, live_from, live_to)
    full_from = jnp.where(by_id[:, None], live_to, full_from)  # ids are compared where not full
    full_to = jnp.clip((high.min(axis=2) + 1 - begin) // tile, live_from, live_to)
    shared = [jnp.arange(tiles), start, count, columns, by_id.astype(jnp.int32)]
    fields = [jnp.broadcast_to(x[:, None], (tiles, groups)) for x in shared]
    fields += [live_from, live_to, live_columns, full_from, full_to]
    fields += [jnp.zeros_like(live_to)] * (FIELDS - len(fields))
    return jnp.stack(fields, axis=2).astype(jnp.int32)


def _tiles_up_to(columns, tile: int):
    """Column tiles that cover this many columns; none for a negative number."""
    return jnp.maximum(-(-columns // tile), 0)
