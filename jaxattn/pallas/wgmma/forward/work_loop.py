"""Loop over a program's work tiles, then over the tiles flagged for the second (running-max) pass.

`tile_scheduler.persistent_schedule` assigns work tiles to programs. The consumers flag work tiles
whose first pass overflowed (`softmax.set_flags`).
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxattn.pallas.wgmma.forward.context import KernelContext


def work_loop(ctx: KernelContext, mainloop, prefetch, between_passes) -> None:
    """Run mainloop(i, tile_head, row, prefetched, kv_tiles_before, online) for each work tile.

    Producer and consumers call this function, and so take the same work tiles in the same order.
    In the second pass i goes on counting.

    Args:
      ctx: the program's context.
      mainloop: returns the number of KV tiles of the work tile. With `online` it keeps a running
        maximum. `kv_tiles_before` counts the KV tiles of all work tiles before.
      prefetch: reads fields of the work list at `row`, one work tile ahead.
      between_passes: called before the second pass.
    """
    schedule, retry_flags = ctx.gmem.schedule, ctx.smem.retry_flags

    def work_tile(n):
        # Beyond the last work tile this reads the padding of the schedule.
        index = schedule[ctx.program, 1 + jnp.minimum(n, schedule.shape[1] - 2)]
        row, tile_head = lax.rem(index, ctx.row_tiles), lax.div(index, ctx.row_tiles)
        return row, tile_head, prefetch(row)

    def step(i, carry):
        (row, tile_head, prefetched), kv_tiles = carry
        ahead = work_tile(i + 1)  # read now, so that the next work tile need not wait for it
        online = not ctx.two_passes
        return ahead, kv_tiles + mainloop(i, tile_head, row, prefetched, kv_tiles, online=online)

    start = work_tile(jnp.int32(0)), jnp.int32(0)
    _, kv_tiles = lax.fori_loop(0, ctx.num_work_tiles, step, start)
    if not ctx.two_passes:
        return

    def flagged(index):
        return (retry_flags[0, index] | retry_flags[1, index]) != 0

    def retry(n, carry):
        def run(i, kv_tiles):
            row, tile_head, prefetched = work_tile(n)
            kv_tiles = kv_tiles + mainloop(i, tile_head, row, prefetched, kv_tiles, online=True)
            return i + 1, kv_tiles

        return lax.cond(flagged(retry_flag(ctx, n)), run, lambda *carry: carry, *carry)

    between_passes()
    plgpu.barrier_wait(ctx.smem.retry_full)

    @pl.when(flagged(ctx.num_retry_flags))
    def _():
        lax.fori_loop(0, ctx.num_work_tiles, retry, (ctx.num_work_tiles, kv_tiles))


def retry_flag(ctx: KernelContext, n):
    """Return the index of the retry flag of the program's n-th work tile."""
    tiles_per_flag = -(-(ctx.gmem.schedule.shape[1] - 1) // ctx.num_retry_flags)
    return lax.div(n, jnp.int32(tiles_per_flag))
