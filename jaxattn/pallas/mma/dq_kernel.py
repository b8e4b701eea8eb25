"""The dq kernel of the deterministic backward by mma.sync: no sum crosses programs.

R rows = B * T queries end to end, C columns = B * S keys, N query heads, K kv heads, H head dim.
A program owns a row tile as in the forward kernel, but of 64 rows, and loops over the live tiles of
keys: S = Q K^T, dP = dO V^T, dQ += dS K. dS goes from registers to the left factor of its product,
and dQ stays in registers until the end.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn.block_map import BlockMap
from jaxattn.pallas.launch import launch
from jaxattn.pallas.mma import cp_async, fragments, row_access
from jaxattn.pallas.mma.fragments import MMA_K
from jaxattn.pallas.mma.tiles import ForwardTiles
from jaxattn.pallas.mma.work_tile import WorkTile, zeros
from jaxattn.pallas.operands import BackwardOperands
from jaxattn.pallas.smem import ring_slot, swizzled
from jaxattn.pallas.softmax import LOG2E, TILE, by_row


def scratch(head_dim: int, dtype: jnp.dtype, tiles: ForwardTiles) -> dict:
    """Return the shared memory of one program."""
    own = plgpu.SMEM((tiles.rows, head_dim), dtype, transforms=swizzled(dtype))
    kv = (tiles.stages, tiles.block_kv, head_dim)
    ring = plgpu.SMEM(kv, dtype, transforms=swizzled(dtype))
    bounds = plgpu.SMEM((2, tiles.rows), jnp.int32)
    return {"q": own, "do": own, "k": ring, "v": ring, "row_bounds": bounds}


def query_gradient(
    x: BackwardOperands, work: BlockMap, *, scale: float, tiles: ForwardTiles
) -> Float[Array, "R N H"]:
    """Run the dq kernel, see `jaxattn.pallas.op.Family`."""
    R, N, H = x.q_RNH.shape
    K = x.k_CKH.shape[1]
    dtype, stages = x.q_RNH.dtype, tiles.stages
    row_tiles = -(-R // tiles.queries)
    shape = (tiles.rows, tiles.block_kv)

    def kernel(gmem, smem):
        program = lax.axis_index("program")
        entry, tile_head = lax.rem(program, row_tiles), lax.div(program, row_tiles)
        head = tile_head * tiles.qheads_per_tile
        kv_head = lax.div(head, jnp.int32(N // K))
        tile = WorkTile(gmem, entry, 0, row_bounds=smem.row_bounds, block_cols=tiles.block_kv)
        token = tile.row_tile * tiles.queries
        of_heads = {"heads": tiles.qheads_per_tile}

        def start_copy(j):
            @pl.when(j < tile.count)
            def _():
                slot, at = ring_slot(j, stages), (tile.column(j), kv_head)
                cp_async.copy_rows(gmem.k, smem.k.at[slot], *at)
                cp_async.copy_rows(gmem.v, smem.v.at[slot], *at)

            cp_async.commit()

        def product(left, right):
            sums = zeros(shape, TILE)
            return fragments.add_product(sums, left, right, along="columns", m_warps=4)

        cp_async.copy_rows(gmem.q, smem.q, token, head, **of_heads)
        cp_async.copy_rows(gmem.do, smem.do, token, head, **of_heads)
        start_copy(jnp.int32(0))
        lse_rows, delta_rows = (
            row_access.load_by_row(stat, token, head, rows=tiles.rows, **of_heads)
            for stat in (gmem.lse, gmem.delta)
        )

        def step(j, dq_acc):
            slot = ring_slot(j, stages)
            cp_async.wait(0)
            cp_async.barrier()
            if stages > 1:
                start_copy(j + 1)
            s = tile.masked(product(smem.q, smem.k.at[slot]), j)
            dp = product(smem.do, smem.v.at[slot])
            p = jnp.exp2(s * (scale * LOG2E) - by_row(lse_rows, shape))
            ds16 = (p * (dp - by_row(delta_rows, shape))).astype(dtype)
            ds16 = fragments.as_left_factor(ds16)
            for i in range(tiles.block_kv // MMA_K):
                part = ds16[:, i * MMA_K : (i + 1) * MMA_K]
                k = fragments.load_factor(smem.k.at[slot], i, side="right", along="rows")
                dq_acc = plgpu.mma(dq_acc, part, k)
            if stages == 1:
                cp_async.barrier()
                start_copy(j + 1)
            return dq_acc

        dq_acc = lax.fori_loop(0, tile.count, step, zeros((tiles.rows, H), TILE))
        cp_async.barrier()
        smem.q[...] = (dq_acc * scale).astype(dtype)
        cp_async.barrier()
        cp_async.store_rows(smem.q, gmem.dq, token, head, **of_heads)

    arrays = {"q": x.q_RNH, "k": x.k_CKH, "v": x.v_CKH, "do": x.do_RNH}
    beyond = ((0, 0), (0, max(row_tiles * tiles.queries - x.lse_NR.shape[1], 0)))
    stats = {"lse": jnp.pad(x.lse_NR, beyond), "delta": jnp.pad(x.delta_NR, beyond)}
    [dq_RNH] = launch(
        kernel,
        name="flash_backward_dq_mma",
        programs=row_tiles * (N // tiles.qheads_per_tile),
        warpgroups=1,
        inputs=arrays | stats | work.inputs,
        out={"dq": jax.ShapeDtypeStruct((R, N, H), dtype)},
        scratch=scratch(H, dtype, tiles),
        semantics=plgpu.LoweringSemantics.Lane,
        reduction_scratch_bytes=0,
    )
    return dq_RNH
