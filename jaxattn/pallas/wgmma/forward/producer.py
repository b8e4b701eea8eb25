"""The forward kernel's producer: copies what the consumers compute with, as far ahead as fits."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxattn import block_map
from jaxattn.pallas.launch import PRODUCER_REGISTERS
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.tiles import CONSUMERS
from jaxattn.pallas.wgmma.forward.context import ITEM_SLOTS, SHORT, Job, either
from jaxattn.pallas.wgmma.forward.work_loop import each_item


def produce(job: Job) -> None:
    """All that the producer warpgroup does."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

    def load(row):
        fields = (block_map.TILE, block_map.START, block_map.COUNT, block_map.COLUMNS)
        return [job.gmem.work[row, 0, i] for i in fields]

    def body(i, head, row, loaded, done, careful):
        row_tile, start, count, columns = loaded
        kv_head = lax.div(head * job.tiles.heads, job.group)
        _copy_item(job, i, row, row_tile, head)
        _copy_keys(job, start, count, columns, kv_head, done, careful)
        return count

    each_item(job, body, load, between=lambda: None)


def _copy_item(job: Job, i, row, row_tile, head) -> None:
    """Metadata, and Q by one copy a head, for each consumer."""
    gmem, smem = job.gmem, job.smem
    for consumer in range(CONSUMERS):
        slot = job.item_slot(i, consumer)
        full, parity = smem.q_full.at[slot], lax.rem(i, jnp.int32(ITEM_SLOTS))
        plgpu.barrier_wait(smem.q_free.at[slot])
        work = smem.work_smem.at[parity, consumer, pl.ds(0, block_map.FIELDS)]
        plgpu.copy_gmem_to_smem(gmem.work.at[row, consumer], work, full)
        ends = smem.ends_smem.at[parity, consumer]
        plgpu.copy_gmem_to_smem(gmem.ends.at[row, consumer], ends, full)
        for tokens, q_head, rows in job.by_head(row_tile, head, consumer):
            q = smem.q_smem.at[parity, consumer, rows]
            plgpu.copy_gmem_to_smem(gmem.q.at[tokens, q_head], q, full)


def _copy_keys(job: Job, start, count, columns, kv_head, done, careful: bool) -> None:
    """K and V of every column tile that some row of the item sees.

    V comes one tile behind K: its stage is free only after P V, a softmax later than the stage of
    K, and the next K, which is needed first, must not wait for that.
    """
    gmem, smem, tiles = job.gmem, job.smem, job.tiles

    @pl.loop(0, count + 1)
    def _(j):
        def copy(j, source, target, full, free):
            slot = ring_slot(done + j, tiles.stages)
            col = pl.multiple_of(job.column(start, j), block_map.ALIGN)
            plgpu.barrier_wait(free.at[slot])

            def keys(size):
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(col, size), kv_head],
                    target.at[slot, pl.ds(0, size)],
                    full.at[slot],
                )

            short = job.ends_short(columns, j, careful)
            either(short, lambda: keys(SHORT), lambda: keys(tiles.block_kv))

        @pl.when(j < count)
        def _():
            copy(j, gmem.k, smem.k_smem, smem.k_full, smem.k_free)

        @pl.when(j > 0)
        def _():
            copy(j - 1, gmem.v, smem.v_smem, smem.v_full, smem.v_free)
