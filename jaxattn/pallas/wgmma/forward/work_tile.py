"""One consumer's part of a work tile, for the kernels whose programs own queries."""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxattn.pallas import softmax
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.wgmma.forward.context import QueryContext


class WorkTile:
    """Rows of one consumer, and the KV tiles that they see: `live_from` to `live_to` - 1."""

    def __init__(self, ctx: QueryContext, wg, *, row, fields: list, q, row_bounds, kv_tiles_before):
        """Unpack the work-list entry.

        Args:
          ctx: the program's context.
          wg: index of the consumer.
          row: index of the row tile in the work list.
          fields: entry of `BlockMap.work` for this consumer, in the order of `WorkField`.
          q: ref [WARPGROUP_ROWS, H] in shared memory.
          row_bounds: ref [2, WARPGROUP_ROWS] in shared memory.
          kv_tiles_before: KV tiles that passed through the ring of stages before this work tile.
        """
        self.ctx: Any = ctx
        self.wg, self.row, self.q, self.row_bounds = wg, row, q, row_bounds
        self.kv_tiles_before = kv_tiles_before
        self.row_tile, self.start, self.count, _, self.by_id = fields[:5]
        self.live_from, self.live_to, self.live_columns, self.full_from, self.full_to = fields[5:]

    def skip(self, j, _):
        """Free a KV tile unread, because only the other consumer needs it; a `fori_loop` body."""
        smem, slot = self.ctx.smem, self.slot(j)
        plgpu.barrier_wait(smem.k_full.at[slot])
        plgpu.barrier_arrive(smem.k_free.at[slot])
        plgpu.barrier_wait(smem.v_full.at[slot])
        plgpu.barrier_arrive(smem.v_free.at[slot])
        return ()

    def masked(self, s, j):
        """Return the scores of the j-th KV tile, -inf where the mask hides them."""
        col = self.ctx.kv_column(self.start, j)
        ids = None
        gmem = self.ctx.gmem
        if gmem.row_ids is not None:
            tile_ids = gmem.col_ids.at[pl.ds(col, s.shape[1])]
            ids = self.by_id, gmem.row_ids.at[self.row, self.wg], tile_ids
        below, above = j < self.full_from, j >= self.full_to
        return softmax.mask_scores(s, col, self.row_bounds, below=below, above=above, ids=ids)

    def rounded(self, x):
        """Cast to the dtype of the inputs."""
        return x.astype(self.ctx.gmem.q.dtype)

    def slot(self, j):
        """Return the stage that holds the j-th KV tile."""
        return ring_slot(self.kv_tiles_before + j, self.ctx.tiles.stages)

    def wait_for_k(self, j) -> None:
        """Wait for the j-th K tile if the consumer sees it."""

        @pl.when(j < self.live_to)
        def _():
            plgpu.barrier_wait(self.ctx.smem.k_full.at[self.slot(j)])

    def wait_for_v(self, j) -> None:
        """Wait for the j-th V tile."""
        plgpu.barrier_wait(self.ctx.smem.v_full.at[self.slot(j)])
