"""Work list of a tiled kernel: the column tiles that each row tile must visit under a mask.

"Rows" are the tokens that a program of the kernel owns (queries in the forward pass, keys in the
backward pass); "columns" are the tokens that it loops over. Batch rows are concatenated: the
kernels see one axis of B * T rows and one of B * S columns, and the mask keeps batch rows apart.

The columns that a row sees are within one range. The work of a row tile is therefore a range of
column tiles, and the metadata is O(rows / tile). The ranges bound the work. Inside a tile, the
row's own range decides where documents are contiguous (BY_ID is 0), else the comparison of segment
ids (BY_ID is 1).

A block pattern cuts holes into the ranges. The ranges are then ranges of a list of the live column
tiles (`block_pattern.py`); the kernels look up the columns in `cols`, and the length of a batch row
is rounded up to whole blocks.
"""

import dataclasses
import enum
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxattn.block_pattern import live_tiles
from jaxattn.mask import BLOCK, Mask
from jaxattn.ranges import SENTINEL, Band, Tokens, visible_ranges

# Tiles start at multiples of this: TMA needs 16-byte aligned, 8-row aligned boxes.
ALIGN = 8


class WorkField(enum.IntEnum):
    """Fields of an entry of `BlockMap.work`.

    The first five are equal for all groups of a row tile. Column tiles are counted from START;
    tiles below FULL_FROM or from FULL_TO on need masking, the others do not.
    """

    ROW_TILE = 0
    """Index of the row tile."""
    START = 1
    """First column, a multiple of ALIGN; with `BlockMap.cols`, its index in `cols`."""
    COUNT = 2
    """Number of column tiles."""
    COLUMNS = 3
    """Number of columns up to the last that some row sees."""
    BY_ID = 4
    """1 if segment ids decide inside the tiles."""
    LIVE_FROM = 5
    """First column tile that a row of the group sees."""
    LIVE_TO = 6
    """End (exclusive) of the column tiles that rows of the group see."""
    LIVE_COLUMNS = 7
    """COLUMNS of the group."""
    FULL_FROM = 8
    """Tiles below may hold columns before a row's range, or the first that a row sees."""
    FULL_TO = 9
    """Tiles from here on may hold columns after a row's range."""


# Length of an entry of `BlockMap.work`: TMA copies multiples of four.
WORK_FIELDS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tile sizes of a work list.

    Attributes:
      group_rows: rows in a group; a row tile is `groups` neighboring groups.
      groups: groups of rows in a tile, each with its own live range (one per warpgroup).
      block_cols: columns in a column tile.
      repeat: times that a group's rows appear, one after another (query heads packed into a tile).
    """

    group_rows: int
    groups: int
    block_cols: int
    repeat: int = 1

    @property
    def rows(self) -> int:
        """Rows in a row tile."""
        return self.group_rows * self.groups


# jax rebuilds it with placeholders in place of arrays, which type checkers must let pass.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMap:
    """Work list of one kernel, longest row tile first.

    Attributes:
      work: int32 [tiles, groups, WORK_FIELDS], see `WorkField`.
      row_bounds: int32 [tiles, groups, 2, rows], in the same order: first and last visible column
        of each row; (SENTINEL, -1) for a row that sees nothing.
      cols: first columns of the tiles to visit, int32: a list for each row of the block pattern,
        concatenated; None if the mask has no pattern, then the tiles of a row are neighbors.
      row_ids: segment id of each row, int32 [tiles, groups, rows]; None if the mask has no
        documents.
      col_ids: segment id of each column, int32 [columns + padding]; None likewise.
    """

    work: Int[Array, "tiles groups fields"]
    row_bounds: Int[Array, "tiles groups 2 rows"]
    cols: Int[Array, " lists"] | None
    row_ids: Int[Array, "tiles groups rows"] | None
    col_ids: Int[Array, " columns"] | None

    @property
    def inputs(self) -> dict[str, Array | None]:
        """Inputs of a kernel by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def stride(mask: Mask, length: int) -> int:
    """Return the tokens from one batch row of this length to the next, as the maps count them."""
    return length if mask.blocks is None else -(-length // BLOCK) * BLOCK


def query_map(mask: Mask, batch: int, t: int, s: int, tiling: Tiling) -> BlockMap:
    """Build the work list of a kernel whose programs own queries and loop over keys (forward).

    The mask, concrete or traced, is that of `batch` rows with t queries and s keys each. Rows of
    the tiling are queries, columns are keys.

    Raises:
      NotImplementedError: the mask has a block pattern, and the tiles do not divide its blocks.
    """
    before = mask.reach(t, s)
    band = Band(before=before, after=0 if mask.causal else before)
    queries, keys = Tokens(ids=mask.segment_ids, length=t), Tokens(ids=mask.key_ids, length=s)
    return _block_map(queries, keys, band, _blocks_of_batch(mask, batch), batch, tiling)


def key_map(mask: Mask, batch: int, t: int, s: int, tiling: Tiling) -> BlockMap:
    """Build the work list of a kernel whose programs own keys and loop over queries (backward).

    Arguments and errors as for `query_map`; rows of the tiling are keys, columns are queries.
    """
    after = mask.reach(t, s)
    band = Band(before=0 if mask.causal else after, after=after)
    queries, keys = Tokens(ids=mask.segment_ids, length=t), Tokens(ids=mask.key_ids, length=s)
    blocks = _blocks_of_batch(mask, batch)
    if blocks is not None:
        blocks = blocks.swapaxes(1, 2)
    return _block_map(keys, queries, band, blocks, batch, tiling)


def _blocks_of_batch(mask: Mask, batch: int) -> Bool[Array, "B P Q"] | None:
    """Return the block pattern of each batch row."""
    blocks = mask.blocks
    return None if blocks is None else jnp.broadcast_to(blocks, (batch, *blocks.shape[-2:]))


def _block_map(
    rows: Tokens,
    cols: Tokens,
    band: Band,
    blocks: Bool[Array, "B P Q"] | None,
    batch: int,
    tiling: Tiling,
) -> BlockMap:
    first, last, contiguous = visible_ranges(rows, cols, band, batch)
    # The kernel loops from low to high: over the columns, or over the list of live columns.
    low, high, lists = first, last, None
    row_length, col_length = rows.length, cols.length
    if blocks is not None:
        _check_tiles(tiling)
        lists = live_tiles(blocks, tiling.block_cols)
        low, high = lists.listed(first, last)
        row_length, col_length = (blocks.shape[i] * BLOCK for i in (1, 2))
    sees_none = low > high
    batch_offset = jnp.arange(batch, dtype=jnp.int32)[:, None] * col_length
    first = jnp.where(sees_none, SENTINEL, first + batch_offset)
    last = jnp.where(sees_none, -1, last + batch_offset)
    if lists is None:
        low, high = first, last
    tiles = -(-batch * row_length // tiling.rows)

    def tiled(x: Array, fill: int) -> Array:
        x = _pad_tokens(x, row_length, fill).reshape(-1)
        x = jnp.pad(x, (0, tiles * tiling.rows - x.size), constant_values=fill)
        return x.reshape(tiles, tiling.groups, tiling.group_rows)

    sees_none, contiguous = tiled(sees_none, True), tiled(contiguous, True)
    work = _work(
        jnp.where(sees_none, SENTINEL, tiled(low, 0)),
        jnp.where(sees_none, -1, tiled(high, 0)),
        by_id=~contiguous.all(axis=(1, 2)),
        tile=tiling.block_cols,
        align=ALIGN if lists is None else tiling.block_cols,
    )
    if lists is not None:  # lists are concatenated; the rows of a tile have the same list
        list_offset = jnp.arange(tiles) * tiling.rows // BLOCK * lists.cols_BPW.shape[2]
        start = list_offset[:, None] + work[:, :, WorkField.START] // tiling.block_cols
        work = work.at[:, :, WorkField.START].set(start.astype(jnp.int32))
    row_bounds = jnp.stack([tiled(first, SENTINEL), tiled(last, -1)], axis=2)
    order = jnp.argsort(-work[:, 0, WorkField.COUNT], stable=True)

    def repeated(x: Array) -> Array:
        return jnp.concatenate([x[order]] * tiling.repeat, axis=-1)

    row_ids, col_ids = rows.ids, cols.ids
    if row_ids is not None and col_ids is not None:
        row_ids = repeated(tiled(row_ids.astype(jnp.int32), 0))
        # Padded so that the last column tile, wherever it starts, reads inside the array.
        col_ids = _pad_tokens(col_ids.astype(jnp.int32), col_length, 0).reshape(-1)
        col_ids = jnp.pad(col_ids, (0, tiling.block_cols))
    return BlockMap(
        work=work[order],
        row_bounds=repeated(row_bounds),
        row_ids=row_ids,
        col_ids=col_ids,
        cols=None if lists is None else (lists.cols_BPW + batch_offset[:, :, None]).reshape(-1),
    )


def _check_tiles(tiling: Tiling) -> None:
    if BLOCK % tiling.rows or BLOCK % tiling.block_cols:
        raise NotImplementedError(
            f"blocks need tiles that divide {BLOCK}, these heads have {tiling.rows} x "
            f"{tiling.block_cols} (see jaxattn/tuned.json); use impl='xla'"
        )


def _pad_tokens(x: Array, length: int, fill: int) -> Array:
    """Pad a value per token, [B, tokens], to this length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=fill)


def _work(
    low: Int[Array, "tiles groups group"],
    high: Int[Array, "tiles groups group"],
    *,
    by_id: Bool[Array, " tiles"],
    tile: int,
    align: int,
) -> Int[Array, "tiles groups fields"]:
    """Compute `BlockMap.work`, not yet sorted, of rows that see columns low .. high."""
    tiles, groups, _ = low.shape
    start = low.min(axis=(1, 2)) // align * align
    start = jnp.where(start < SENTINEL, start, 0)
    # At least one tile everywhere, also where nothing is visible: such a tile is masked as a
    # whole, and the kernels need no special case.
    begin = start[:, None]
    live_columns = jnp.maximum(high.max(axis=2) + 1 - begin, 1)
    columns = live_columns.max(axis=1)
    count = _tiles_up_to(columns, tile)
    live_from = jnp.minimum((low.min(axis=2) - begin) // tile, count[:, None] - 1)
    live_to = jnp.maximum(_tiles_up_to(live_columns, tile), live_from + 1)
    # The tile in which the last row begins is below FULL_FROM, even if the row begins with the
    # tile: the forward kernel looks there for rows that see their first key.
    before = low.max(axis=2) - begin
    full_from = jnp.where(before > 0, before // tile + 1, 0)
    full_from = jnp.clip(full_from, live_from, live_to)
    full_from = jnp.where(by_id[:, None], live_to, full_from)  # ids are compared where not full
    full_to = jnp.clip((high.min(axis=2) + 1 - begin) // tile, live_from, live_to)
    shared = [jnp.arange(tiles), start, count, columns, by_id.astype(jnp.int32)]
    fields = [jnp.broadcast_to(x[:, None], (tiles, groups)) for x in shared]
    fields += [live_from, live_to, live_columns, full_from, full_to]
    fields += [jnp.zeros_like(live_to)] * (WORK_FIELDS - len(fields))
    return jnp.stack(fields, axis=2).astype(jnp.int32)


def _tiles_up_to(columns, tile: int):
    """Return the number of column tiles that cover this many columns; 0 for a negative number."""
    return jnp.maximum(-(-columns // tile), 0)
