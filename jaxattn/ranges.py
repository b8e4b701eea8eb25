"""Visible column range of each row, from documents, causal order and window.

"Rows" and "columns" are queries and keys (forward) or keys and queries (backward). B batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# First column of a row that sees nothing. Above every column index, and still far from int32
# overflow when tile sizes are added to it.
SENTINEL = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """One axis of the score matrix.

    Attributes:
      ids: segment id of each token, 0 for padding; None: one document in each batch row.
      length: tokens in a batch row.
    """

    ids: Int[Array, "B tokens"] | None
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """Causal order and window as a band around the diagonal.

    Attributes:
      before: row i sees no column before i - before; None: unlimited.
      after: row i sees no column after i + after; None: unlimited.
    """

    before: int | None
    after: int | None


def visible_ranges(
    rows: Tokens, cols: Tokens, band: Band, batch: int
) -> tuple[Int[Array, "B rows"], Int[Array, "B rows"], Bool[Array, "B rows"]]:
    """Compute the first and last visible column of every row.

    Returns:
      (first, last, contiguous): columns are counted within the batch row. A row that sees nothing
      has first > last. `contiguous` is False where a column between first and last is hidden.
    """
    i = jnp.arange(rows.length, dtype=jnp.int32)[None]
    first = jnp.zeros((batch, rows.length), jnp.int32)
    last = jnp.full((batch, rows.length), cols.length - 1, jnp.int32)
    contiguous = jnp.ones((batch, rows.length), bool)
    if rows.ids is not None and cols.ids is not None:
        first, last, contiguous = jax.vmap(_document_ranges)(rows.ids, cols.ids)
    if band.before is not None:
        first = jnp.maximum(first, i - band.before)
    if band.after is not None:
        last = jnp.minimum(last, i + band.after)
    return first, last, contiguous


def _document_ranges(row_ids, col_ids):
    """Find the first and last column with each row's id, and if the id's columns are contiguous.

    Sorting makes ids in any order right, in O(n log n) work and O(n) memory.
    """
    order = jnp.argsort(col_ids, stable=True).astype(jnp.int32)
    sorted_ids = col_ids[order]
    begin = jnp.searchsorted(sorted_ids, row_ids, side="left").astype(jnp.int32)
    end = jnp.searchsorted(sorted_ids, row_ids, side="right").astype(jnp.int32)
    found = (end > begin) & (row_ids != 0)
    first = jnp.where(found, order[jnp.minimum(begin, col_ids.size - 1)], SENTINEL)
    last = jnp.where(found, order[jnp.maximum(end - 1, 0)], -1)
    return first, last, ~found | (last - first == end - begin - 1)
