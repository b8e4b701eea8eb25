"""A program's entry of the work list, shared by the kernels: its tiles, columns and mask."""

import types
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jaxattn.block_map import WorkField
from jaxattn.pallas import softmax
from jaxattn.pallas.mma.lanes import THREADS


class WorkTile:
    """A row tile of a work list: the column tiles of a program or warpgroup, and their mask.

    Attributes:
      row_tile: index of the row tile.
      count: number of column tiles.
      live_from: first column tile that a row of the group sees.
      live_to: end (exclusive) of the column tiles that rows of the group see.
    """

    def __init__(self, gmem: types.SimpleNamespace, entry, group, *, row_bounds, block_cols: int):
        """Read the entry, and copy the bounds of its rows to shared memory.

        Args:
          gmem: refs to global memory, with those of the block map.
          entry: index in the work list.
          group: index of the group of rows.
          row_bounds: ref int32 [2, rows] in shared memory.
          block_cols: columns in a column tile.
        """
        self._gmem, self._at = gmem, (entry, group)
        self._block_cols, self._row_bounds = block_cols, row_bounds

        def field(name: WorkField):
            return gmem.work[entry, group, name.value]

        self.row_tile, self._start = field(WorkField.ROW_TILE), field(WorkField.START)
        self.count, self._by_id = field(WorkField.COUNT), field(WorkField.BY_ID)
        self.live_from, self.live_to = field(WorkField.LIVE_FROM), field(WorkField.LIVE_TO)
        self._full_from, self._full_to = field(WorkField.FULL_FROM), field(WorkField.FULL_TO)
        strided = plgpu.Layout.WG_STRIDED(
            row_bounds.shape, vec_size=row_bounds.shape[1] * 2 // THREADS
        )
        row_bounds[...] = plgpu.load(gmem.row_bounds.at[self._at], layout=strided, optimized=False)

    def column(self, j):
        """Return the first column of the j-th column tile."""
        if self._gmem.cols is None:
            return self._start + j * self._block_cols
        return self._gmem.cols[self._start + j]

    def is_full(self, j):
        """Return True if the j-th column tile needs no mask."""
        return (j >= self._full_from) & (j < self._full_to)

    def masked(self, s, j, layout: Any = None):
        """Set the hidden scores of the j-th column tile to -inf; see `softmax.mask_scores`."""
        start, ids, gmem = self.column(j), None, self._gmem
        if gmem.row_ids is not None:
            col_ids = gmem.col_ids.at[pl.ds(start, self._block_cols)]
            ids = self._by_id, gmem.row_ids.at[self._at], col_ids
        below, above = j < self._full_from, j >= self._full_to
        return softmax.mask_scores(
            s, start, self._row_bounds, below=below, above=above, ids=ids, layout=layout
        )


def zeros(shape: tuple[int, ...], layout, value: float = 0.0):
    """Return fp32 registers of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
