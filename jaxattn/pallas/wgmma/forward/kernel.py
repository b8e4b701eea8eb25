"""The forward kernel: block-sparse flash attention for Hopper, persistent and warp-specialised.

R rows = B * T queries end to end, C columns = B * S keys, N query heads, K kv heads, H head dim.
A program owns tiles of `CONSUMERS * group` queries x `heads` query heads of one kv head, one after
another, and walks over the live tiles of keys. The last of these is short, `SHORT` keys wide, where
no more are needed. jaxattn/README.md draws the dataflow.

There are two passes in bf16. The first takes a row's maximum in the tile in which it first sees a
key, and lets later scores rise above it: the exponents of bf16 and fp32 have room for 2**127. Items
in which some row went further than `softmax.REACH` are flagged, and the second pass, which is over
at once where there are none, does them again with a running maximum. fp16 has the second alone.

| barrier    | arrives                        | waits         | asserts                           |
| ---------- | ------------------------------ | ------------- | --------------------------------- |
| q_full     | copies of the item, Q by heads | its consumer  | the slot holds the item           |
| q_free     | the consumer, one item later   | producer      | the slot may be overwritten       |
| k_full     | copy of K                      | all consumers | the stage holds K                 |
| k_free     | every consumer after its Q K^T | producer      | the stage of K may be overwritten |
| v_full     | copy of V                      | all consumers | the stage holds V                 |
| v_free     | every consumer after its P V   | producer      | the stage of V may be overwritten |
| again_full | every consumer, after pass one | all three     | all flags are set                 |

The consumers arrive once on every "free" barrier at their start, so that the producer always waits
before it copies and the first round needs no special case.
"""

import functools
import types

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn.block_map import BlockMap
from jaxattn.pallas.launch import PRODUCER, launch
from jaxattn.pallas.smem import swizzled
from jaxattn.pallas.tile_scheduler import persistent_schedule
from jaxattn.pallas.tiles import CONSUMERS, WARPGROUP_ROWS, ForwardTiles
from jaxattn.pallas.wgmma.forward.consumer import consume
from jaxattn.pallas.wgmma.forward.context import ITEM_SLOTS, Gmem, Job
from jaxattn.pallas.wgmma.forward.producer import produce

# Programs of the persistent grid: one on each multiprocessor of an H100 or H200.
PROGRAMS = 132
# Flags for items to be done again: one each, or where a program has more items, for neighbours.
AGAIN = 127


def scratch(head_dim: int, dtype: jnp.dtype, tiles: ForwardTiles) -> dict:
    """Shared memory and barriers of one program."""
    rows, items = WARPGROUP_ROWS, (ITEM_SLOTS, CONSUMERS)
    kv = (tiles.stages, tiles.block_kv, head_dim)
    barrier = functools.partial(plgpu.Barrier, num_barriers=tiles.stages)
    item_barrier = functools.partial(plgpu.Barrier, num_barriers=ITEM_SLOTS * CONSUMERS)
    return {
        "q_smem": plgpu.SMEM((*items, rows, head_dim), dtype, transforms=swizzled(dtype)),
        # Not all of each row is used: the copy engine writes to multiples of 128 bytes.
        "work_smem": plgpu.SMEM((*items, 32), jnp.int32),
        "ends_smem": plgpu.SMEM((*items, 2, rows), jnp.int32),
        "k_smem": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        "v_smem": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        "lse_smem": plgpu.SMEM((CONSUMERS, rows), jnp.float32),
        "q_full": item_barrier(num_arrivals=tiles.heads + 2),  # and the two of its metadata
        "q_free": item_barrier(),
        "k_full": barrier(),
        "k_free": barrier(num_arrivals=CONSUMERS),
        "v_full": barrier(),
        "v_free": barrier(num_arrivals=CONSUMERS),
        # Which items a consumer wants again, and in the last place whether it wants any.
        "again_smem": plgpu.SMEM((CONSUMERS, AGAIN + 1), jnp.int32),
        "again_full": plgpu.Barrier(num_arrivals=CONSUMERS),
    }


def forward(
    q_RNH: Float[Array, "R N H"],
    k_CKH: Float[Array, "C K H"],
    v_CKH: Float[Array, "C K H"],
    work: BlockMap,
    *,
    scale: float,
    tiles: ForwardTiles,
) -> tuple[Float[Array, "R N H"], Float[Array, "N rows"]]:
    """Runs the kernel.

    Args:
      q_RNH: queries, bf16 or fp16; H is 64 or 128.
      k_CKH: keys, same dtype.
      v_CKH: values, same dtype.
      work: `query_map` for these tiles.
      scale: above 0.
      tiles: the tile sizes that `work` was made for.

    Returns:
      o_RNH in the dtype of q, and the log-sum-exp of the scaled scores in units of log 2, fp32
      [N, R rounded up to a row tile]; +inf for rows that see nothing, whose o is 0.
    """
    R, N, H = q_RNH.shape
    K = k_CKH.shape[1]
    dtype = q_RNH.dtype
    queries = CONSUMERS * tiles.group  # of a row tile
    row_tiles = -(-R // queries)
    tile_heads = N // tiles.heads  # work items along the head axis
    programs = min(PROGRAMS, row_tiles * tile_heads)
    schedule = persistent_schedule(row_tiles, tile_heads, programs)
    by_id, by_list = work.row_ids is not None, work.cols is not None

    def kernel(q, k, v, schedule, work, ends, *refs, **smem):
        *optional, o, lse = refs
        cols, ids = optional[:by_list], optional[by_list:]
        wg, program = lax.axis_index("wg"), lax.axis_index("program")
        job = Job(
            tiles=tiles,
            scale=scale,
            head_dim=H,
            group=N // K,
            row_tiles=row_tiles,
            two_passes=dtype == jnp.bfloat16,
            program=program,
            items=schedule[program, 0],
            gmem=Gmem(
                *(q, k, v, schedule, work, ends),
                cols=cols[0] if by_list else None,
                ids=tuple(ids) if by_id else None,
                o=o,
                lse=lse,
            ),
            smem=types.SimpleNamespace(**smem),
        )
        pl.when(wg == PRODUCER)(lambda: produce(job))
        pl.when(wg < CONSUMERS)(lambda: consume(job, wg))

    run = launch(
        kernel,
        name="flash_forward",
        programs=programs,
        scratch=scratch(H, dtype, tiles),
        out=(
            jax.ShapeDtypeStruct((R, N, H), dtype),
            jax.ShapeDtypeStruct((N, row_tiles * queries), jnp.float32),
        ),
        reduction_scratch_bytes=0,
    )
    optional = [x for x in (work.cols, work.row_ids, work.col_ids) if x is not None]
    return run(q_RNH, k_CKH, v_CKH, jnp.asarray(schedule), work.work, work.ends, *optional)
