"""The backward kernel's producer: copies K and V once, then Q and dO tile by tile."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxattn import block_map
from jaxattn.pallas.launch import PRODUCER_REGISTERS
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.wgmma.backward.context import Job


def produce(job: Job) -> None:
    """All that the producer warpgroup does."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    gmem, smem, barriers, tiles = job.gmem, job.smem, job.barriers, job.tiles
    keys = pl.ds(job.key, tiles.block_kv), job.head_cols(job.kv_head)
    plgpu.copy_gmem_to_smem(gmem.k.at[keys], smem.k_smem, barriers.kv_full)
    plgpu.copy_gmem_to_smem(gmem.v.at[keys], smem.v_smem, barriers.kv_full)
    for i in range(2):
        ends = gmem.ends.at[job.row, 0, i]
        plgpu.copy_gmem_to_smem(ends, smem.ends_smem.at[i], barriers.ends_full)

    def load(head, t, i):
        slot = ring_slot(i, tiles.stages)
        token = job.first_query(t)
        at = pl.ds(token, tiles.block_q), job.head_cols(head)
        stat = pl.ds(pl.multiple_of(head * job.stride + token, block_map.ALIGN), tiles.block_q)

        def wait_until(free):
            # Nothing to wait for in the first round.
            pl.when(i >= tiles.stages)(lambda: plgpu.barrier_wait(free[i]))

        wait_until(barriers.q_free)
        plgpu.copy_gmem_to_smem(gmem.q.at[at], smem.q_smem.at[slot], barriers.q_full[i])
        plgpu.copy_gmem_to_smem(gmem.lse.at[stat], smem.lse_smem.at[slot], barriers.q_full[i])
        wait_until(barriers.do_free)
        plgpu.copy_gmem_to_smem(gmem.do.at[at], smem.do_smem.at[slot], barriers.do_full[i])
        plgpu.copy_gmem_to_smem(gmem.delta.at[stat], smem.delta_smem.at[slot], barriers.do_full[i])

    job.each_tile(load)
