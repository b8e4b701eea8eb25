"""The backward kernel by mma.sync: one pass over the keys, five products per tile.

R rows = B * T queries end to end, C columns = B * S keys, N query heads, K kv heads, G = N / K,
H head dim. A program owns 64 keys per warpgroup of one kv head, keeps their dK and dV in registers,
and loops over the live tiles of queries of the group's G heads. Scores are transposed, S^T [keys,
queries]. P^T and dS^T go through shared memory: with two warps along each side of a product, 32 x
32 scores and 32 x 64 numbers of a gradient per warp, the products need a fifth fewer loads from
shared memory, the limit of this kernel, than with P^T and dS^T in registers. dQ is added to fp32
numbers in global memory (`row_access.add_rows`); with two warpgroups, each computes half of its
columns, so that a number is added once per 128 keys.

Q, dO, lse and delta arrive by cp.async. With two stages the next tile's copies start at the
beginning of an iteration; with one, after dK has read Q.

    wait for Q_i, dO_i | barrier | S^T = K Q^T, P^T; dP^T = V dO^T, dS^T; both stored
                         barrier | dV += P^T dO, dK += dS^T Q, dQ += dS K
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxattn.block_map import BlockMap
from jaxattn.pallas.launch import launch
from jaxattn.pallas.mma import cp_async, fragments, row_access
from jaxattn.pallas.mma.fragments import MMA_K
from jaxattn.pallas.mma.tiles import BackwardTiles
from jaxattn.pallas.mma.work_tile import WorkTile, zeros
from jaxattn.pallas.operands import BackwardOperands
from jaxattn.pallas.smem import ring_slot, swizzled
from jaxattn.pallas.softmax import LOG2E, by_col
from jaxattn.pallas.tiles import WARPGROUP_ROWS

# Q tiles that a program processes in one head before it turns to the next head: programs that run
# at once then read the same tiles of Q and dO, and add to the same tiles of dQ, while these are in
# the L2 cache.
Q_CHUNK = 32
# Warps along the rows of a product, and as many along its columns.
M_WARPS = 2


def scratch(head_dim: int, dtype: jnp.dtype, tiles: BackwardTiles) -> dict:
    """Return the shared memory of one program."""
    q, kv, stages = tiles.block_q, tiles.block_kv, tiles.stages

    def tile(*shape):
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

    numbers = plgpu.SMEM((stages, q), jnp.float32)
    return {
        "k": tile(kv, head_dim),
        "v": tile(kv, head_dim),
        "q": tile(stages, q, head_dim),
        "do": tile(stages, q, head_dim),
        "p": tile(kv, q),
        "ds": tile(kv, q),
        "lse": numbers,
        "delta": numbers,
        "row_bounds": plgpu.SMEM((tiles.warpgroups, 2, WARPGROUP_ROWS), jnp.int32),
        "head_and_key": plgpu.SMEM((2,), jnp.int32),
    }


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
    dtype, stages, warpgroups = x.q_RNH.dtype, tiles.stages, tiles.warpgroups
    row_length, group = x.lse_NR.shape[1], N // K
    key_tiles = -(-C // tiles.block_kv)
    layout = fragments.acc_layout(dtype, M_WARPS)
    shape = (WARPGROUP_ROWS, tiles.block_q)
    # Columns of dQ at a time: at most 64, for which registers are left beside dK and dV.
    dq_columns = min(64, H // warpgroups)
    dq_parts = H // warpgroups // dq_columns
    add_product = functools.partial(fragments.add_product, m_warps=M_WARPS)

    def kernel(gmem, smem):
        wg = lax.axis_index("wg") if warpgroups > 1 else jnp.int32(0)
        program = lax.axis_index("program")
        index = gmem.order[program]
        entry, kv_head = lax.rem(index, key_tiles), lax.div(index, key_tiles)
        row_bounds = smem.row_bounds.at[wg]
        tile = WorkTile(gmem, entry, wg, row_bounds=row_bounds, block_cols=tiles.block_q)
        key = tile.row_tile * tiles.block_kv
        own = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        own_k, own_v, own_p, own_ds = (ref.at[own] for ref in (smem.k, smem.v, smem.p, smem.ds))
        barrier = functools.partial(cp_async.barrier, warpgroups)
        copy_rows = functools.partial(cp_async.copy_rows, warpgroups=warpgroups)

        # A position in the loop is (tiles of the chunks before, head of the group, tile in the
        # chunk): all tiles of a chunk for one head, then for the next head, then the next chunk.
        def tile_and_head(position, first_head):
            """Return the Q tile, from the last to the first, and the query head of a position."""
            offset, g, j = position
            return tile.count - 1 - offset - j, first_head + g

        def advance(position):
            """Return the next position."""
            offset, g, j = position
            last = j + 1 == jnp.minimum(tile.count - offset, Q_CHUNK)
            last_head = last & (g + 1 == group)
            return (
                jnp.where(last_head, offset + Q_CHUNK, offset),
                jnp.where(last, jnp.where(last_head, 0, g + 1), g),
                jnp.where(last, 0, j + 1),
            )

        def start_copy(position, i, first_head):
            @pl.when(position[0] < tile.count)
            def _():
                slot = ring_slot(i, stages)
                t, head = tile_and_head(position, first_head)
                token = tile.column(t)
                copy_rows(gmem.q, smem.q.at[slot], token, head)
                copy_rows(gmem.do, smem.do.at[slot], token, head)
                start = head * row_length + token
                cp_async.copy_numbers(gmem.lse, smem.lse.at[slot], start)
                cp_async.copy_numbers(gmem.delta, smem.delta.at[slot], start)

            cp_async.commit()

        copy_rows(gmem.k, smem.k, key, kv_head)
        copy_rows(gmem.v, smem.v, key, kv_head)
        first = (jnp.int32(0),) * 3
        start_copy(first, jnp.int32(0), kv_head * group)
        # Read again where they are needed: on sm_80 no register is left to keep them.
        smem.head_and_key[0], smem.head_and_key[1] = kv_head, key

        def step(i, carry):
            dk_acc, dv_acc, *position = carry
            slot = ring_slot(i, stages)
            q_tile, do_tile = smem.q.at[slot], smem.do.at[slot]
            ahead = advance(position)
            cp_async.wait(0)
            barrier()
            first_head = smem.head_and_key[0] * group
            t, head = tile_and_head(position, first_head)
            if stages > 1:
                start_copy(ahead, i + 1, first_head)

            def each_row(ref):
                numbers = plgpu.load(ref.at[slot], layout=layout.reduce(0))
                return by_col(numbers, shape, layout)

            def masked(s):
                # One branch around the masks, which few tiles need.
                cut = functools.partial(tile.masked, j=t, layout=layout)
                return lax.cond(tile.is_full(t), lambda s: s, cut, s)

            def score_gradients():
                start = zeros(shape, layout)
                s = masked(add_product(start, own_k, q_tile, along="columns"))
                p = jnp.exp2(s * (scale * LOG2E) - each_row(smem.lse))
                dp = add_product(start, own_v, do_tile, along="columns")
                fragments.store_product(own_p, p.astype(dtype), M_WARPS)
                ds = p * (dp - each_row(smem.delta))
                fragments.store_product(own_ds, ds.astype(dtype), M_WARPS)

            def no_score_gradients():
                fragments.store_product(own_ds, zeros(shape, layout).astype(dtype), M_WARPS)

            def key_gradients(dk_acc, dv_acc):
                dv_acc = add_product(dv_acc, own_p, do_tile, along="rows")
                return add_product(dk_acc, own_ds, q_tile, along="rows"), dv_acc

            if warpgroups == 1:  # every visited tile is live
                score_gradients()
                barrier()
                dk_acc, dv_acc = key_gradients(dk_acc, dv_acc)
            else:
                live = (t >= tile.live_from) & (t < tile.live_to)
                lax.cond(live, score_gradients, no_score_gradients)
                barrier()
                dk_acc, dv_acc = lax.cond(live, key_gradients, lambda *x: x, dk_acc, dv_acc)
            if stages == 1:
                barrier()
                start_copy(ahead, i + 1, first_head)
            if with_dq:
                for part in range(dq_parts):
                    columns = pl.ds(part * dq_columns, warpgroups * dq_columns)
                    dq_acc = zeros((tiles.block_q, dq_columns), layout)
                    load = functools.partial(fragments.load_factor, along="rows", m_warps=M_WARPS)
                    for c in range(tiles.block_kv // MMA_K):
                        ds = load(smem.ds, c, side="left")
                        k = load(smem.k.at[:, columns], c, side="right", warpgroups=warpgroups)
                        dq_acc = plgpu.mma(dq_acc, ds, k)
                    row_access.add_rows(
                        gmem.dq,
                        dq_acc,
                        tile.column(t),
                        head,
                        dtype=dtype,
                        m_warps=M_WARPS,
                        vector=tiles.vector,
                        column=part * dq_columns,
                        own=dq_columns if warpgroups > 1 else 0,
                    )
            return dk_acc, dv_acc, *ahead

        start = zeros((WARPGROUP_ROWS, H), layout)
        dk_acc, dv_acc, *_ = lax.fori_loop(0, tile.count * group, step, (start, start, *first))
        # Staged in the memory of K and V, after all warpgroups have read them.
        barrier()
        fragments.store_product(own_v, dv_acc.astype(dtype), M_WARPS)
        fragments.store_product(own_k, (dk_acc * scale).astype(dtype), M_WARPS)
        barrier()
        kv_head, key = smem.head_and_key[0], smem.head_and_key[1]
        cp_async.store_rows(smem.v, gmem.dv, key, kv_head, warpgroups=warpgroups)
        cp_async.store_rows(smem.k, gmem.dk, key, kv_head, warpgroups=warpgroups)

    arrays = {"q": x.q_RNH, "k": x.k_CKH, "v": x.v_CKH, "do": x.do_RNH}
    # A tile of queries may reach beyond the last of them.
    stats = {
        name: jnp.pad(stat.reshape(-1), (0, tiles.block_q))
        for name, stat in (("lse", x.lse_NR), ("delta", x.delta_NR))
    }
    dq_sum = None
    if with_dq:
        # Without the barrier XLA fills the zeros of all layers of a model in one pass, before the
        # first layer's backward.
        zero, stats = lax.optimization_barrier((jnp.float32(0), stats))
        eights = -(-(R + tiles.block_q) // 8)
        dq_sum = jax.new_ref(jnp.broadcast_to(zero, (eights, N, 8 * H)))
    dk, dv = launch(
        kernel,
        name="flash_backward_mma" if with_dq else "flash_backward_dkv_mma",
        programs=key_tiles * K,
        warpgroups=warpgroups,
        inputs=arrays | stats | {"dq": dq_sum, "order": order} | work.inputs,
        out=dict.fromkeys(("dk", "dv"), jax.ShapeDtypeStruct((C, K, H), dtype)),
        scratch=scratch(H, dtype, tiles),
        semantics=plgpu.LoweringSemantics.Lane,
        reduction_scratch_bytes=0,
    )
    if dq_sum is None:
        return None, dk, dv
    dq = row_access.in_rows(dq_sum[...], H, vector=tiles.vector)[:R]
    return (dq * scale).astype(dtype), dk, dv
