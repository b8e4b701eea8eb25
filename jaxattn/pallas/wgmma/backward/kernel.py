"""Backward kernel: one pass over the keys, five products a tile, dQ by fp32 reduce-add.

R rows = B * T concatenated queries, C columns = B * S keys, N query heads, K kv heads, G = N / K,
H head dim. A program owns one tile of `block_kv` keys of one kv head (64 keys per warpgroup), keeps
its dK and dV in registers, and loops over the live Q tiles of the group's G heads, in an order for
the L2 cache (`KernelContext.work_loop`). Scores are transposed, S^T [keys, queries], so that P^T
and dS^T can go from registers into dV += P^T dO and dK += dS^T Q; dS goes through shared memory
for dQ += dS K.

| barrier     | arrives                        | waits     | asserts                               |
| ----------- | ------------------------------ | --------- | ------------------------------------- |
| kv_full     | copies of K and V              | consumers | K and V of the program are loaded     |
| bounds_full | copies of both row bounds      | consumers | the keys' visible ranges are loaded   |
| q_full      | copies of Q and lse            | consumers | the stage holds Q and lse             |
| q_free      | each consumer after its dK     | producer  | the stage of Q may be overwritten     |
| do_full     | copies of dO and delta         | consumers | the stage holds dO and delta          |
| do_free     | each consumer after its dV     | producer  | the stage of dO may be overwritten    |
| ds_full     | each consumer, its half stored | consumers | the slot holds dS^T of all keys       |

All have two arrivals, so one Barrier object serves them: one register of phases instead of seven.
dS needs no "free" barrier, because it has `stages` slots, at least two: a warpgroup can only store
into a slot again after a ds_full in between, which the other consumer reaches after its dQ has read
the slot.

Without dQ (`with_dq=False`, for the deterministic backward, whose dQ `dq_kernel` computes) the
kernel has four products: dS does not go through shared memory, ds_full is not used.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxattn.block_map import BlockMap, WorkField
from jaxattn.pallas.launch import launch
from jaxattn.pallas.operands import BackwardOperands
from jaxattn.pallas.smem import swizzled
from jaxattn.pallas.tiles import WARPGROUP_ROWS
from jaxattn.pallas.wgmma.backward.consumer import consume
from jaxattn.pallas.wgmma.backward.context import Barriers, KernelContext
from jaxattn.pallas.wgmma.backward.producer import produce
from jaxattn.pallas.wgmma.tiles import CONSUMERS, PRODUCER, BackwardTiles


def scratch(head_dim: int, dtype: jnp.dtype, tiles: BackwardTiles, *, with_dq: bool = True) -> dict:
    """Return the shared memory and barriers of one program."""
    q, kv, stages = tiles.block_q, tiles.block_kv, tiles.stages
    dq_rows, dq_cols = dq_part(head_dim, tiles)

    def tile(*shape, dtype: Any = dtype):
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

    for_dq = {
        "dq_smem": tile(CONSUMERS, dq_rows, dq_cols, dtype=jnp.float32),
        "ds_smem": tile(stages, q, kv),
    }
    return {
        "barriers": plgpu.Barrier(num_arrivals=2, num_barriers=Barriers.count(stages)),
        "delta_smem": plgpu.SMEM((stages, q), jnp.float32),
        "do_smem": tile(stages, q, head_dim),
        **(for_dq if with_dq else {}),
        "bounds_smem": plgpu.SMEM((2, kv), jnp.int32),
        "k_smem": tile(kv, head_dim),
        "lse_smem": plgpu.SMEM((stages, q), jnp.float32),
        "q_smem": tile(stages, q, head_dim),
        "v_smem": tile(kv, head_dim),
    }


def dq_part(head_dim: int, tiles: BackwardTiles) -> tuple[int, int]:
    """Return the (rows, columns) of dQ that one consumer computes, over all keys of the tile.

    Half of the head dim for each consumer, which halves the adds to memory against partial sums
    over keys. At head dim 64, where half would be narrower than a swizzled row, half of the
    queries.
    """
    if head_dim // CONSUMERS >= WARPGROUP_ROWS:
        return tiles.block_q, head_dim // CONSUMERS
    return tiles.block_q // CONSUMERS, head_dim


def backward(
    x: BackwardOperands,
    work: BlockMap,
    order: Int[Array, " programs"],
    *,
    scale: float,
    tiles: BackwardTiles,
    with_dq: bool,
) -> tuple[Float[Array, "R N H"] | None, Float[Array, "C K H"], Float[Array, "C K H"]]:
    """Run the backward kernel, see `jaxattn.pallas.op.Family`."""
    R, N, H = x.q_RNH.shape
    C, K = x.k_CKH.shape[:2]
    dtype, delta_NR = x.q_RNH.dtype, x.delta_NR
    col_tiles = -(-C // tiles.block_kv)  # "rows" of the block map are keys here

    def kernel(gmem, smem):
        wg, program = lax.axis_index("wg"), lax.axis_index("program")
        index = gmem.order[program]
        row, kv_head = lax.rem(index, col_tiles), lax.div(index, col_tiles)
        key_tile, start, count = (
            gmem.work[row, 0, field]
            for field in (WorkField.ROW_TILE, WorkField.START, WorkField.COUNT)
        )
        ctx = KernelContext(
            tiles=tiles,
            scale=scale,
            head_dim=H,
            qheads_per_kvhead=N // K,
            stride=delta_NR.shape[1],
            dq_part=dq_part(H, tiles),
            gmem=gmem,
            smem=smem,
            barriers=Barriers(smem.barriers, tiles.stages),
            row=row,
            kv_head=kv_head,
            key=key_tile * tiles.block_kv,
            start=start,
            count=count,
        )
        pl.when(wg == PRODUCER)(lambda: produce(ctx))
        # A copy of the code for each warpgroup: with its index a constant, the descriptors of
        # K and V are constants too. As a run-time value it measured 0 to 4% slower.
        for index in range(CONSUMERS):
            pl.when(wg == index)(functools.partial(consume, ctx, index))

    dq_sum = None
    if with_dq:
        # Without the barrier XLA fills the zeros of all layers of a model in one pass, before the
        # first layer's backward: 256 MiB each at 32k tokens of 16 heads, on top of the peak.
        delta_NR, zero = lax.optimization_barrier((delta_NR, jnp.float32(0)))
        dq_sum = jax.new_ref(jnp.broadcast_to(zero, (R, N * H)))
    arrays = {"q": x.q_RNH, "k": x.k_CKH, "v": x.v_CKH, "do": x.do_RNH}
    arrays = {name: array.reshape(array.shape[0], -1) for name, array in arrays.items()}
    stats = {"lse": x.lse_NR.reshape(-1), "delta": delta_NR.reshape(-1)}
    dk, dv = launch(
        kernel,
        name="flash_backward" if with_dq else "flash_backward_dkv",
        programs=col_tiles * K,
        warpgroups=CONSUMERS + 1,
        inputs=arrays | stats | {"dq": dq_sum, "order": order} | work.inputs,
        out=dict.fromkeys(("dk", "dv"), jax.ShapeDtypeStruct((C, K * H), dtype)),
        scratch=scratch(H, dtype, tiles, with_dq=with_dq),
        semantics=plgpu.LoweringSemantics.Warpgroup,
    )
    dk, dv = dk.reshape(C, K, H), dv.reshape(C, K, H)
    if dq_sum is None:
        return None, dk, dv
    return (dq_sum[...] * scale).astype(dtype).reshape(R, N, H), dk, dv
