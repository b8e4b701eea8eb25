"""The range of columns that each row sees, from documents, causal order and window.

"Rows" and "columns" are queries and keys, or keys and queries; B batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Above every column index, and still far from overflow when tile sizes are added to it.
NEVER = 1 << 30


def visible_ranges(
    row_ids: Int[Array, "B rows"] | None,
    col_ids: Int[Array, "B cols"] | None,
    batch: int,
    rows: int,
    cols: int,
    before: int | None,
    after: int | None,
) -> tuple[Int[Array, "B rows"], Int[Array, "B rows"], Bool[Array, "B rows"]]:
    """First and last visible column of every row, and whether all between are visible.

    Args:
      row_ids: segment id of each row, 0 for padding; None: one document.
      col_ids: segment id of each column; None likewise.
      batch: rows of the batch.
      rows: rows of a batch row.
      cols: columns of a batch row.
      before: row i sees no column before i - before; None: all.
      after: row i sees no column behind i + after; None: all.

    Returns:
      (first, last, whether none between is hidden), columns counted within the batch row. A row
      that sees nothing has its first behind its last.
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
    return first, last, by_range


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
