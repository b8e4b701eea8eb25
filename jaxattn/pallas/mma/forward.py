"""The forward kernel by mma.sync: block-sparse flash attention, one warpgroup per program.

R rows = B * T queries end to end, C columns = B * S keys, N query heads, K kv heads, H head dim.
A program owns a row tile, `queries` x `qheads_per_tile` query heads of one kv head, and loops over
the live tiles of keys: S = Q K^T, online softmax, O += P V. P goes from the registers of S to the
left factor of the next product. Two programs run on a multiprocessor, one's products during the
other's softmax. The row tiles start in the order of their length, the longest first.

K and V arrive by cp.async, `stages` tiles ahead. In an iteration, the first barrier orders the
last iteration's reads of V before the next copy to its stage, the second the reads of K:

    wait for K_j | barrier | start V_(j + stages - 1) | S = Q K_j^T
    wait for V_j | barrier | start K_(j + stages)     | softmax, O += P V_j
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn.block_map import BlockMap
from jaxattn.pallas import softmax
from jaxattn.pallas.launch import launch
from jaxattn.pallas.mma import cp_async, fragments, row_access
from jaxattn.pallas.mma.fragments import MMA_K
from jaxattn.pallas.mma.tiles import ForwardTiles
from jaxattn.pallas.mma.work_tile import WorkTile, zeros
from jaxattn.pallas.operands import Operands
from jaxattn.pallas.smem import ring_slot, swizzled
from jaxattn.pallas.softmax import PARTS, ROW, TILE, by_row


def scratch(head_dim: int, dtype: jnp.dtype, tiles: ForwardTiles) -> dict:
    """Return the shared memory of one program."""
    kv = (tiles.stages, tiles.block_kv, head_dim)
    return {
        "q": plgpu.SMEM((tiles.rows, head_dim), dtype, transforms=swizzled(dtype)),
        "k": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        "v": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        "row_bounds": plgpu.SMEM((2, tiles.rows), jnp.int32),
    }


def forward(
    x: Operands, work: BlockMap, *, scale: float, tiles: ForwardTiles
) -> tuple[Float[Array, "R N H"], Float[Array, "N rows"]]:
    """Run the forward kernel, see `jaxattn.pallas.op.Family`."""
    R, N, H = x.q_RNH.shape
    K = x.k_CKH.shape[1]
    dtype, stages = x.q_RNH.dtype, tiles.stages
    row_tiles = -(-R // tiles.queries)

    def kernel(gmem, smem):
        program = lax.axis_index("program")
        # Heads outermost: the programs that run at once read the K and V of few heads from L2.
        entry, tile_head = lax.rem(program, row_tiles), lax.div(program, row_tiles)
        head = tile_head * tiles.qheads_per_tile
        kv_head = lax.div(head, jnp.int32(N // K))
        tile = WorkTile(gmem, entry, 0, row_bounds=smem.row_bounds, block_cols=tiles.block_kv)
        token = tile.row_tile * tiles.queries
        of_heads = {"heads": tiles.qheads_per_tile}

        def start_copy(source, target, j):
            @pl.when(j < tile.count)
            def _():
                slot = ring_slot(j, stages)
                cp_async.copy_rows(source, target.at[slot], tile.column(j), kv_head)

            cp_async.commit()

        cp_async.copy_rows(gmem.q, smem.q, token, head, **of_heads)
        start_copy(gmem.k, smem.k, jnp.int32(0))
        for j in range(stages - 1):
            start_copy(gmem.v, smem.v, jnp.int32(j))
            start_copy(gmem.k, smem.k, jnp.int32(j + 1))

        def step(j, carry):
            o_acc, m, l = carry
            slot = ring_slot(j, stages)
            cp_async.wait(2 * (stages - 1))
            cp_async.barrier()
            start_copy(gmem.v, smem.v, j + stages - 1)
            s = fragments.add_product(
                zeros((tiles.rows, tiles.block_kv), TILE),
                smem.q,
                smem.k.at[slot],
                along="columns",
                m_warps=4,
            )
            cp_async.wait(2 * (stages - 1))
            cp_async.barrier()
            start_copy(gmem.k, smem.k, j + stages)
            p, l, m, alpha = softmax.online_softmax(tile.masked(s, j), m, l, scale)
            o_acc = softmax.rescale(o_acc, alpha)
            p16 = fragments.as_left_factor(p.astype(dtype))
            for i in range(tiles.block_kv // MMA_K):
                part = p16[:, i * MMA_K : (i + 1) * MMA_K]
                v = fragments.load_factor(smem.v.at[slot], i, side="right", along="rows")
                o_acc = plgpu.mma(o_acc, part, v)
            return o_acc, m, l

        carry = (
            zeros((tiles.rows, H), TILE),
            zeros((tiles.rows,), ROW, softmax.M_START),
            zeros((tiles.rows, PARTS), TILE),
        )
        o_acc, m, l = lax.fori_loop(0, tile.count, step, carry)
        l = l.sum(axis=1)
        sees_any = l > 0.0
        o_acc = o_acc * by_row(jnp.where(sees_any, 1.0 / l, 0.0), o_acc.shape)
        # Staged in the memory of Q, which all warps have read before the last barrier.
        smem.q[...] = o_acc.astype(dtype)
        cp_async.barrier()
        cp_async.store_rows(smem.q, gmem.o, token, head, **of_heads)
        lse = jnp.where(sees_any, m + jnp.log2(l), jnp.inf)
        row_access.store_by_row(gmem.lse, lse, token, head, **of_heads)

    o_RNH, lse_NR = launch(
        kernel,
        name="flash_forward_mma",
        programs=row_tiles * (N // tiles.qheads_per_tile),
        warpgroups=1,
        inputs={"q": x.q_RNH, "k": x.k_CKH, "v": x.v_CKH, **work.inputs},
        out={
            "o": jax.ShapeDtypeStruct((R, N, H), dtype),
            "lse": jax.ShapeDtypeStruct((N, row_tiles * tiles.queries), jnp.float32),
        },
        scratch=scratch(H, dtype, tiles),
        semantics=plgpu.LoweringSemantics.Lane,
        reduction_scratch_bytes=0,
    )
    return o_RNH, lse_NR
