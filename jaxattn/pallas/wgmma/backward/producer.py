"""Producer of the backward kernel: copies K and V once, then Q and dO tile by tile."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxattn import block_map
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.wgmma.backward.context import KernelContext
from jaxattn.pallas.wgmma.tiles import PRODUCER_REGISTERS


def produce(ctx: KernelContext) -> None:
    """Run the producer warpgroup."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    gmem, smem, barriers, tiles = ctx.gmem, ctx.smem, ctx.barriers, ctx.tiles
    keys = pl.ds(ctx.key, tiles.block_kv), ctx.head_slice(ctx.kv_head)
    plgpu.copy_gmem_to_smem(gmem.k.at[keys], smem.k_smem, barriers.kv_full)
    plgpu.copy_gmem_to_smem(gmem.v.at[keys], smem.v_smem, barriers.kv_full)
    for i in range(2):
        bound = gmem.row_bounds.at[ctx.row, 0, i]
        plgpu.copy_gmem_to_smem(bound, smem.bounds_smem.at[i], barriers.bounds_full)

    def mainloop(head, t, i):
        slot = ring_slot(i, tiles.stages)
        token = ctx.aligned_q_column(t)
        rows = pl.ds(token, tiles.block_q), ctx.head_slice(head)
        stats = pl.ds(pl.multiple_of(head * ctx.stride + token, block_map.ALIGN), tiles.block_q)

        def wait_until(free):
            # The stages are free in the first round.
            pl.when(i >= tiles.stages)(lambda: plgpu.barrier_wait(free[i]))

        wait_until(barriers.q_free)
        plgpu.copy_gmem_to_smem(gmem.q.at[rows], smem.q_smem.at[slot], barriers.q_full[i])
        plgpu.copy_gmem_to_smem(gmem.lse.at[stats], smem.lse_smem.at[slot], barriers.q_full[i])
        wait_until(barriers.do_free)
        plgpu.copy_gmem_to_smem(gmem.do.at[rows], smem.do_smem.at[slot], barriers.do_full[i])
        delta = gmem.delta.at[stats]
        plgpu.copy_gmem_to_smem(delta, smem.delta_smem.at[slot], barriers.do_full[i])

    ctx.work_loop(mainloop)
