"""The backward kernel by mma.sync: one pass over the keys, five products per tile.

R rows = B * T queries end to end, C columns = B * S keys, N query heads, K kv heads, G = N / K,
H head dim. A program owns 64 keys per warpgroup of one kv head, keeps their dK and dV in registers,
and loops over the live tiles of queries of the group's G heads. Scores are transposed, S^T [keys,
queries]. With two warps along each side of every product, 32 x 32 scores and 32 x 64 numbers of a
gradient per warp, a warp has half of the P^T and dS^T that it multiplies in registers and takes the
other half from its neighbor through shared memory: loads from shared memory are the limit of this
kernel. dQ is added to fp32 numbers in global memory (`row_access.add_rows`).

With two warpgroups, each computes half of the columns of dQ, so that a number is added once per 128
keys, and needs the dS^T of both. It adds dQ of the iteration before, whose dS^T is complete: one
warpgroup at the start of an iteration and the other at its end, so that the products of one run
beside the exponentials of the other. One warpgroup alone adds dQ of the same tile at the end, after
a barrier.

Q, dO, lse and delta arrive by cp.async. With two stages the next tile's copies start at the
beginning of an iteration; with one, after dK has read Q.

    wait for Q_i, dO_i | barrier | warpgroup 1: dQ += dS_i-1 K
        S^T = K Q^T, P^T | pair: exchange | dV += P^T dO, dP^T = V dO^T, dS^T
        pair: exchange | dK += dS^T Q | warpgroup 0: dQ += dS_i-1 K
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxattn.block_map import BlockMap, WorkField
from jaxattn.pallas.launch import launch
from jaxattn.pallas.mma import cp_async, fragments, row_access
from jaxattn.pallas.mma.fragments import MMA_K
from jaxattn.pallas.mma.tile_walk import ENTRY, RING, TileWalk
from jaxattn.pallas.mma.tiles import BackwardTiles
from jaxattn.pallas.mma.work_tile import WorkTile, zeros
from jaxattn.pallas.operands import BackwardOperands
from jaxattn.pallas.smem import ring_slot, swizzled
from jaxattn.pallas.softmax import LOG2E, by_col
from jaxattn.pallas.tiles import WARPGROUP_ROWS

# Two warps along the rows of a product, and two along its columns.
M_WARPS = fragments.OF_PAIRS


def scratch(head_dim: int, dtype: jnp.dtype, tiles: BackwardTiles, with_dq: bool = True) -> dict:
    """Return the shared memory of one program."""
    ds_slots = 2 if with_dq and tiles.warpgroups > 1 else 1
    q, kv, stages = tiles.block_q, tiles.block_kv, tiles.stages

    def tile(*shape):
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

    numbers = plgpu.SMEM((stages, q), jnp.float32)
    return {
        "k": tile(kv, head_dim),
        "v": tile(kv, head_dim),
        "q": tile(stages, q, head_dim),
        "do": tile(stages, q, head_dim),
        "ds": tile(ds_slots, kv, q),
        "lse": numbers,
        "delta": numbers,
        "row_bounds": plgpu.SMEM((tiles.warpgroups, 2, WARPGROUP_ROWS), jnp.int32),
        "fields": plgpu.SMEM((tiles.warpgroups, len(WorkField)), jnp.int32),
        "walk": plgpu.SMEM((RING, ENTRY), jnp.int32),
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
    # Two warpgroups add dQ of the iteration before, which both have finished at its end.
    dq_later, dq_now = with_dq and warpgroups > 1, with_dq and warpgroups == 1
    add_product = functools.partial(fragments.add_product, m_warps=M_WARPS)

    def kernel(gmem, smem):
        wg = lax.axis_index("wg") if warpgroups > 1 else jnp.int32(0)
        program = lax.axis_index("program")
        index = gmem.order[program]
        entry, kv_head = lax.rem(index, key_tiles), lax.div(index, key_tiles)
        tile = WorkTile(
            gmem,
            entry,
            wg,
            row_bounds=smem.row_bounds.at[wg],
            block_cols=tiles.block_q,
            fields=smem.fields.at[wg] if tiles.entry_in_smem else None,
        )
        walk = TileWalk(smem.walk, tile, kv_head * group, group)
        key = tile.row_tile * tiles.block_kv
        own = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        own_k, own_v = smem.k.at[own], smem.v.at[own]
        barrier = functools.partial(cp_async.barrier, warpgroups)
        copy_rows = functools.partial(cp_async.copy_rows, warpgroups=warpgroups)

        # Computed at each use: on sm_80 no register is left to keep it.
        def iterations():
            return tile.count * group

        def ds_of(i):
            return smem.ds.at[ring_slot(i, smem.ds.shape[0])]

        def start_copy(i, exists):
            @pl.when(exists)
            def _():
                slot = ring_slot(i, stages)
                token, head = walk.token(i), walk.head(i)
                copy_rows(gmem.q, smem.q.at[slot], token, head)
                copy_rows(gmem.do, smem.do.at[slot], token, head)
                start = head * row_length + token
                cp_async.copy_numbers(gmem.lse, smem.lse.at[slot], start)
                cp_async.copy_numbers(gmem.delta, smem.delta.at[slot], start)

            cp_async.commit()

        copy_rows(gmem.k, smem.k, key, kv_head)
        copy_rows(gmem.v, smem.v, key, kv_head)
        start_copy(jnp.int32(0), iterations() > 0)

        def add_dq(i):
            """Add the product of the i-th iteration's dS and K to dQ."""
            ds_tile = ds_of(i)
            for part in range(dq_parts):
                columns = pl.ds(part * dq_columns, warpgroups * dq_columns)
                dq_acc = zeros((tiles.block_q, dq_columns), layout)
                load = functools.partial(fragments.load_factor, along="rows", m_warps=M_WARPS)
                for c in range(tiles.block_kv // MMA_K):
                    ds = load(ds_tile, c, side="left")
                    k = load(smem.k.at[:, columns], c, side="right", warpgroups=warpgroups)
                    dq_acc = plgpu.mma(dq_acc, ds, k)
                row_access.add_rows(
                    gmem.dq,
                    dq_acc,
                    walk.token(i),
                    walk.head(i),
                    dtype=dtype,
                    m_warps=M_WARPS,
                    vector=tiles.vector,
                    column=part * dq_columns,
                    own=dq_columns if warpgroups > 1 else 0,
                )

        def step(carry):
            i, _, *carry = carry
            # Loaded before the barrier, so that the loads are complete after it.
            t = walk.tile(i)
            is_live, is_full, more = tile.is_live(t), tile.is_full(t), i + 1 < iterations()
            ahead = walk.entry(i + 2)
            slot = ring_slot(i, stages)
            q_tile, do_tile = smem.q.at[slot], smem.do.at[slot]
            own_ds = ds_of(i).at[own]
            cp_async.wait(0)
            barrier()
            walk.write(i + 2, ahead)
            if stages > 1:
                start_copy(i + 1, more)

            def each_row(ref):
                numbers = plgpu.load(ref.at[slot], layout=layout.reduce(0))
                return by_col(numbers, shape, layout)

            def masked(s):
                # One branch around the masks, which few tiles need.
                cut = functools.partial(tile.masked, j=t, layout=layout)
                return lax.cond(is_full, lambda s: s, cut, s)

            def exchange(value):
                """Store the warp's part of P^T or dS^T, and wait for that of the other warp."""
                fragments.store_product(own_ds, value, M_WARPS)
                cp_async.pair_barrier()

            def key_gradients(dk_acc, dv_acc):
                start = zeros(shape, layout)
                s = masked(add_product(start, own_k, q_tile, along="columns"))
                p = jnp.exp2(s * (scale * LOG2E) - each_row(smem.lse))
                p16 = p.astype(dtype)
                exchange(p16)
                dv_acc = fragments.add_product_of_pair(dv_acc, p16, own_ds, do_tile)
                dp = add_product(start, own_v, do_tile, along="columns")
                ds = (p * (dp - each_row(smem.delta))).astype(dtype)
                cp_async.pair_barrier()  # P^T is read
                exchange(ds)
                return fragments.add_product_of_pair(dk_acc, ds, own_ds, q_tile), dv_acc

            def no_gradients(dk_acc, dv_acc):
                fragments.store_product(own_ds, zeros(shape, layout).astype(dtype), M_WARPS)
                return dk_acc, dv_acc

            if dq_later:
                pl.when((wg == 1) & (i > 0))(lambda: add_dq(i - 1))
            if warpgroups == 1:  # every visited tile is live
                carry = key_gradients(*carry)
            else:
                carry = lax.cond(is_live, key_gradients, no_gradients, *carry)
            if dq_now or stages == 1:
                barrier()
            if stages == 1:
                start_copy(i + 1, more)
            if dq_now:
                add_dq(i)
            if dq_later:
                pl.when((wg == 0) & (i > 0))(lambda: add_dq(i - 1))
            return i + 1, more, *carry

        start = zeros((WARPGROUP_ROWS, H), layout)
        _, _, dk_acc, dv_acc = lax.while_loop(
            lambda carry: carry[1], step, (jnp.int32(0), iterations() > 0, start, start)
        )
        barrier()
        if dq_later:
            last = iterations() - 1
            pl.when(last >= 0)(lambda: add_dq(last))
            barrier()
        # Staged in the memory of K and V, which all warpgroups have read.
        fragments.store_product(own_v, dv_acc.astype(dtype), M_WARPS)
        fragments.store_product(own_k, (dk_acc * scale).astype(dtype), M_WARPS)
        barrier()
        key = tile.row_tile * tiles.block_kv
        kv_head = lax.div(gmem.order[program], key_tiles)
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
        scratch=scratch(H, dtype, tiles, with_dq),
        semantics=plgpu.LoweringSemantics.Lane,
        reduction_scratch_bytes=0,
    )
    if dq_sum is None:
        return None, dk, dv
    dq = row_access.in_rows(dq_sum[...], H, m_warps=M_WARPS, vector=tiles.vector)[:R]
    return (dq * scale).astype(dtype), dk, dv
