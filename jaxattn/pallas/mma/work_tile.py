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
    """A row tile of a work list: the column tiles of a program or warpgroup, and their mask."""

    def __init__(
        self,
        gmem: types.SimpleNamespace,
        entry,
        group,
        *,
        row_bounds,
        block_cols: int,
        fields: Any = None,
    ):
        """Read the entry, and copy the bounds of its rows to shared memory.

        Args:
          gmem: refs to global memory, with those of the block map.
          entry: index in the work list.
          group: index of the group of rows.
          row_bounds: ref int32 [2, rows] in shared memory.
          block_cols: columns in a column tile.
          fields: ref int32 [number of `WorkField`] in shared memory, from which the entry is read
            at each use; None: it is kept in registers.
        """
        self._gmem, self._at = gmem, (entry, group)
        self._block_cols, self._row_bounds = block_cols, row_bounds
        self._fields: Any = {} if fields is None else fields
        for name in WorkField:
            self._fields[name.value] = gmem.work[entry, group, name.value]
        strided = plgpu.Layout.WG_STRIDED(
            row_bounds.shape, vec_size=row_bounds.shape[1] * 2 // THREADS
        )
        row_bounds[...] = plgpu.load(gmem.row_bounds.at[self._at], layout=strided, optimized=False)

    def _field(self, name: WorkField):
        return self._fields[name.value]

    @property
    def row_tile(self):
        """Index of the row tile."""
        return self._field(WorkField.ROW_TILE)

    @property
    def count(self):
        """Number of column tiles."""
        return self._field(WorkField.COUNT)

    def is_live(self, j):
        """Return True if a row of the group sees a column of the j-th column tile."""
        return (j >= self._field(WorkField.LIVE_FROM)) & (j < self._field(WorkField.LIVE_TO))

    def column(self, j):
        """Return the first column of the j-th column tile."""
        start = self._field(WorkField.START)
        if self._gmem.cols is None:
            return start + j * self._block_cols
        return self._gmem.cols[start + j]

    def is_full(self, j):
        """Return True if the j-th column tile needs no mask."""
        return (j >= self._field(WorkField.FULL_FROM)) & (j < self._field(WorkField.FULL_TO))

    def masked(self, s, j, layout: Any = None):
        """Set the hidden scores of the j-th column tile to -inf; see `softmax.mask_scores`."""
        column, ids, gmem = self.column(j), None, self._gmem
        if gmem.row_ids is not None:
            col_ids = gmem.col_ids.at[pl.ds(column, self._block_cols)]
            ids = self._field(WorkField.BY_ID), gmem.row_ids.at[self._at], col_ids
        below = j < self._field(WorkField.FULL_FROM)
        above = j >= self._field(WorkField.FULL_TO)
        return softmax.mask_scores(
            s, column, self._row_bounds, below=below, above=above, ids=ids, layout=layout
        )


def zeros(shape: tuple[int, ...], layout, value: float = 0.0):
    """Return fp32 registers of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
