"""Forward kernel: block-sparse flash attention for Hopper, persistent and warp-specialized.

R rows = B * T concatenated queries, C columns = B * S keys, N query heads, K kv heads, H head dim.
A program processes one work tile after another: `CONSUMERS * warpgroup_queries` queries x
`qheads_per_tile` query heads of one kv head. It loops over the live KV tiles. The last of these is
short, `SHORT_KV` keys wide, where no more are needed.

There are two passes in bf16. The first pass takes a row's maximum in the KV tile in which the row
first sees a key, and lets later scores rise above it: the exponents of bf16 and fp32 have room for
2**127. The consumers flag work tiles in which a row exceeded `softmax.REACH`. The second pass
recomputes the flagged tiles with a running maximum; it ends at once if there are none. fp16 has
only the second pass.

| barrier    | arrives                        | waits         | asserts                           |
| ---------- | ------------------------------ | ------------- | --------------------------------- |
| q_full     | copies of metadata and Q heads | its consumer  | the slot holds the work tile      |
| q_free     | consumer, one work tile later  | producer      | the slot may be overwritten       |
| k_full     | copy of K                      | all consumers | the stage holds K                 |
| k_free     | every consumer after its Q K^T | producer      | the stage of K may be overwritten |
| v_full     | copy of V                      | all consumers | the stage holds V                 |
| v_free     | every consumer after its P V   | producer      | the stage of V may be overwritten |
| retry_full | every consumer, after pass one | all three     | all retry flags are set           |

The consumers arrive once on every "free" barrier at their start, so that the producer always waits
before it copies and the first round needs no special case.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn.block_map import BlockMap
from jaxattn.pallas.launch import launch
from jaxattn.pallas.operands import Operands
from jaxattn.pallas.smem import swizzled
from jaxattn.pallas.tile_scheduler import persistent_schedule
from jaxattn.pallas.tiles import WARPGROUP_ROWS
from jaxattn.pallas.wgmma.forward.consumer import consume
from jaxattn.pallas.wgmma.forward.context import WORK_SLOTS, KernelContext
from jaxattn.pallas.wgmma.forward.producer import produce
from jaxattn.pallas.wgmma.tiles import CONSUMERS, PRODUCER, ForwardTiles

# Programs of the persistent grid: one per multiprocessor of an H100 or H200.
PROGRAMS = 132
# Retry flags of a program. With more work tiles than flags, neighboring tiles share a flag.
RETRY_FLAGS = 127


def scratch(head_dim: int, dtype: jnp.dtype, tiles: ForwardTiles) -> dict:
    """Return the shared memory and barriers of one program."""
    rows, slots = WARPGROUP_ROWS, (WORK_SLOTS, CONSUMERS)
    kv = (tiles.stages, tiles.block_kv, head_dim)
    barrier = functools.partial(plgpu.Barrier, num_barriers=tiles.stages)
    q_barrier = functools.partial(plgpu.Barrier, num_barriers=WORK_SLOTS * CONSUMERS)
    return {
        "retry_full": plgpu.Barrier(num_arrivals=CONSUMERS),
        # Flags of work tiles for the second pass; the last element is set if any flag is.
        "retry_flags": plgpu.SMEM((CONSUMERS, RETRY_FLAGS + 1), jnp.int32),
        "bounds_smem": plgpu.SMEM((*slots, 2, rows), jnp.int32),
        "k_free": barrier(num_arrivals=CONSUMERS),
        "k_full": barrier(),
        "k_smem": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        "lse_smem": plgpu.SMEM((CONSUMERS, rows), jnp.float32),
        "q_free": q_barrier(),
        "q_full": q_barrier(num_arrivals=tiles.qheads_per_tile + 2),  # and two copies of metadata
        "q_smem": plgpu.SMEM((*slots, rows, head_dim), dtype, transforms=swizzled(dtype)),
        "v_free": barrier(num_arrivals=CONSUMERS),
        "v_full": barrier(),
        "v_smem": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        # The rows have unused space at their end: TMA writes to multiples of 128 bytes.
        "work_smem": plgpu.SMEM((*slots, 32), jnp.int32),
    }


def forward(
    x: Operands, work: BlockMap, *, scale: float, tiles: ForwardTiles
) -> tuple[Float[Array, "R N H"], Float[Array, "N rows"]]:
    """Run the forward kernel, see `jaxattn.pallas.op.Family`."""
    R, N, H = x.q_RNH.shape
    K = x.k_CKH.shape[1]
    dtype = x.q_RNH.dtype
    row_tiles = -(-R // tiles.queries)
    tile_heads = N // tiles.qheads_per_tile
    programs = min(PROGRAMS, row_tiles * tile_heads)
    schedule = persistent_schedule(row_tiles, tile_heads, programs)

    def kernel(gmem, smem):
        wg, program = lax.axis_index("wg"), lax.axis_index("program")
        ctx = KernelContext(
            tiles=tiles,
            scale=scale,
            head_dim=H,
            qheads_per_kvhead=N // K,
            row_tiles=row_tiles,
            two_passes=dtype == jnp.bfloat16,
            program=program,
            num_work_tiles=gmem.schedule[program, 0],
            gmem=gmem,
            smem=smem,
        )
        pl.when(wg == PRODUCER)(lambda: produce(ctx))
        pl.when(wg < CONSUMERS)(lambda: consume(ctx, wg))

    arrays = {"q": x.q_RNH, "k": x.k_CKH, "v": x.v_CKH, "schedule": jnp.asarray(schedule)}
    o_RNH, lse_NR = launch(
        kernel,
        name="flash_forward",
        programs=programs,
        warpgroups=CONSUMERS + 1,
        inputs=arrays | work.inputs,
        out={
            "o": jax.ShapeDtypeStruct((R, N, H), dtype),
            "lse": jax.ShapeDtypeStruct((N, row_tiles * tiles.queries), jnp.float32),
        },
        scratch=scratch(H, dtype, tiles),
        semantics=plgpu.LoweringSemantics.Warpgroup,
        reduction_scratch_bytes=0,
    )
    return o_RNH, lse_NR
