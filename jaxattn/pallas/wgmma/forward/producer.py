"""Producer of the forward kernel: copies Q, K and V to shared memory, as far ahead as fits."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxattn import block_map
from jaxattn.block_map import WorkField
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.wgmma.forward.context import (
    SHORT_KV,
    WORK_SLOTS,
    KernelContext,
    static_cond,
)
from jaxattn.pallas.wgmma.forward.work_loop import work_loop
from jaxattn.pallas.wgmma.tiles import CONSUMERS, PRODUCER_REGISTERS


def produce(ctx: KernelContext) -> None:
    """Run the producer warpgroup."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    def prefetch(row):
        fields = (WorkField.ROW_TILE, WorkField.START, WorkField.COUNT, WorkField.COLUMNS)
        return [ctx.gmem.work[row, 0, field] for field in fields]

    def mainloop(i, tile_head, row, prefetched, kv_tiles_before, online):
        row_tile, start, count, columns = prefetched
        kv_head = ctx.kv_head(tile_head)
        _copy_rows(ctx, i, row, row_tile, tile_head)

        def is_short(j):
            return ctx.is_short(columns, j, online)

        _copy_kv(ctx, start, count, kv_head, kv_tiles_before, is_short)
        return count

    work_loop(ctx, mainloop, prefetch, between_passes=lambda: None)


def _copy_rows(ctx: KernelContext, i, row, row_tile, tile_head) -> None:
    """Copy the work-list entry, the row bounds and Q of each consumer, Q head by head."""
    gmem, smem = ctx.gmem, ctx.smem
    for consumer in range(CONSUMERS):
        barrier = ctx.q_barrier(i, consumer)
        full, slot = smem.q_full.at[barrier], lax.rem(i, jnp.int32(WORK_SLOTS))
        plgpu.barrier_wait(smem.q_free.at[barrier])
        work = smem.work_smem.at[slot, consumer, pl.ds(0, block_map.WORK_FIELDS)]
        plgpu.copy_gmem_to_smem(gmem.work.at[row, consumer], work, full)
        row_bounds = smem.bounds_smem.at[slot, consumer]
        plgpu.copy_gmem_to_smem(gmem.row_bounds.at[row, consumer], row_bounds, full)
        for queries, q_head, rows in ctx.qhead_blocks(row_tile, tile_head, consumer):
            q = smem.q_smem.at[slot, consumer, rows]
            plgpu.copy_gmem_to_smem(gmem.q.at[queries, q_head], q, full)


def _copy_kv(ctx: KernelContext, start, count, kv_head, kv_tiles_before, is_short) -> None:
    """Copy K and V of every KV tile that some row of the work tile sees.

    V comes one tile behind K: its stage is free only after P V, a softmax later than the stage of
    K, and the next K, which is needed first, must not wait for that.
    """
    gmem, smem, tiles = ctx.gmem, ctx.smem, ctx.tiles

    @pl.loop(0, count + 1)
    def _(j):
        def copy(j, source, target, full, free):
            slot = ring_slot(kv_tiles_before + j, tiles.stages)
            col = pl.multiple_of(ctx.kv_column(start, j), block_map.ALIGN)
            plgpu.barrier_wait(free.at[slot])

            def keys(size):
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(col, size), kv_head],
                    target.at[slot, pl.ds(0, size)],
                    full.at[slot],
                )

            static_cond(is_short(j), lambda: keys(SHORT_KV), lambda: keys(tiles.block_kv))

        @pl.when(j < count)
        def _():
            copy(j, gmem.k, smem.k_smem, smem.k_full, smem.k_free)

        @pl.when(j > 0)
        def _():
            copy(j - 1, gmem.v, smem.v_smem, smem.v_full, smem.v_free)
