"""The backward kernel by mma.sync: one pass over the keys, five products per tile.

R rows = B * T queries end to end, C columns = B * S keys, N query heads, K kv heads, G = N / K,
H head dim. A program owns 64 keys per warpgroup of one kv head, keeps their dK and dV in registers,
and loops over the live tiles of queries of the group's G heads. Scores are transposed, S^T [keys,
queries]. P^T and dS^T go through shared memory: with two warps along each side of a product, 32 x
32 scores and 32 x 64 numbers of a gradient per warp, the products need a fifth fewer loads from
shared memory, the limit of this kernel, than with P^T and dS^T in registers. dQ is added to fp32
numbers in global memory (`gmem.add_rows`); with two warpgroups, each computes half of its columns,
so that a number is added once per 128 keys.

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
from jaxtyping import Array, Float

from jaxattn.block_map import BlockMap
from jaxattn.pallas.mma import cp_async, fragments, gmem
from jaxattn.pallas.mma.fragments import MMA_K
from jaxattn.pallas.mma.launch import launch
from jaxattn.pallas.mma.tiles import WARPGROUP_ROWS, BackwardTiles
from jaxattn.pallas.mma.work_tile import WorkTile, optional_arrays, zeros
from jaxattn.pallas.smem import ring_slot, swizzled
from jaxattn.pallas.softmax import LOG2E, by_col

# Tiles of queries in one head before the loop turns to the next head: programs that run at once
# then read the same tiles of Q and dO, and add to the same tiles of dQ, while these are in L2.
STRETCH = 32
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
    }


def backward(
    q_RNH: Float[Array, "R N H"],
    k_CKH: Float[Array, "C K H"],
    v_CKH: Float[Array, "C K H"],
    do_RNH: Float[Array, "R N H"],
    lse_NR: Float[Array, "N rows"],
    delta_NR: Float[Array, "N rows"],
    work: BlockMap,
    *,
    scale: float,
    tiles: BackwardTiles,
    with_dq: bool = True,
) -> tuple[Float[Array, "R N H"] | None, Float[Array, "C K H"], Float[Array, "C K H"]]:
    """Run the kernel.

    Args:
      q_RNH: queries, bf16 or fp16; H is 64 or 128.
      k_CKH: keys, same dtype.
      v_CKH: values, same dtype.
      do_RNH: gradient of the output, same dtype.
      lse_NR: log-sum-exp from the forward kernel; rows beyond R are not read for any visible pair.
      delta_NR: subtrahend of dP: the sum over H of o * do, less the gradient of the natural
        log-sum-exp if there is one; fp32, same shape as lse.
      work: `key_map` for these tiles.
      scale: factor on the scores, above 0.
      tiles: tile sizes of `work`.
      with_dq: compute dq, too.

    Returns:
      dq (or None), dk, dv in the inputs' dtype. dk and dv are the same bits in every run; dq is
      summed in fp32 in the order in which programs finish, so its last bits may differ.
    """
    R, N, H = q_RNH.shape
    C, K = k_CKH.shape[:2]
    dtype, stages, warpgroups = q_RNH.dtype, tiles.stages, tiles.warpgroups
    row_length, group = lse_NR.shape[1], N // K
    key_tiles = -(-C // tiles.block_kv)
    layout = fragments.acc_layout(dtype, M_WARPS)
    shape = (WARPGROUP_ROWS, tiles.block_q)
    # Columns of dQ at a time: at most 64, for which registers are left beside dK and dV.
    dq_columns = min(64, H // warpgroups)
    dq_parts = H // warpgroups // dq_columns
    add_product = functools.partial(fragments.add_product, m_warps=M_WARPS)

    def kernel(q, k, v, do, lse, delta, *refs, smem):
        dq, *refs = refs if with_dq else (None, *refs)
        *refs, dk, dv = refs
        wg = lax.axis_index("wg") if warpgroups > 1 else jnp.int32(0)
        program = lax.axis_index("program")
        # Longest key tile first within a kv head, and one kv head after another.
        entry, kv_head = lax.rem(program, key_tiles), lax.div(program, key_tiles)
        row_bounds = smem.row_bounds.at[wg]
        tile = WorkTile(work, refs, entry, wg, row_bounds=row_bounds, block_cols=tiles.block_q)
        key = tile.row_tile * tiles.block_kv
        own = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        own_k, own_v, own_p, own_ds = (x.at[own] for x in (smem.k, smem.v, smem.p, smem.ds))
        barrier = functools.partial(cp_async.barrier, warpgroups)
        copy_rows = functools.partial(cp_async.copy_rows, warpgroups=warpgroups)

        def place(position):
            """Return the query tile and the query head of a position in the loop."""
            done, g, j = position
            return tile.count - 1 - done - j, kv_head * group + g

        def advance(position):
            """Return the next position: in the stretch of a head, the next head, the next stretch.

            A position is (tiles in earlier stretches, head of the group, tile in the stretch).
            """
            done, g, j = position
            last = j + 1 == jnp.minimum(tile.count - done, STRETCH)
            last_head = last & (g + 1 == group)
            return (
                jnp.where(last_head, done + STRETCH, done),
                jnp.where(last, jnp.where(last_head, 0, g + 1), g),
                jnp.where(last, 0, j + 1),
            )

        def start_copy(position, i):
            @pl.when(position[0] < tile.count)
            def _():
                slot = ring_slot(i, stages)
                t, head = place(position)
                token = tile.column(t)
                copy_rows(q, smem.q.at[slot], token, head)
                copy_rows(do, smem.do.at[slot], token, head)
                start = head * row_length + token
                cp_async.copy_numbers(lse, smem.lse.at[slot], start)
                cp_async.copy_numbers(delta, smem.delta.at[slot], start)

            cp_async.commit()

        copy_rows(k, smem.k, key, kv_head)
        copy_rows(v, smem.v, key, kv_head)
        first = (jnp.int32(0),) * 3
        start_copy(first, jnp.int32(0))

        def step(i, carry):
            dk_acc, dv_acc, *position = carry
            t, head = place(position)
            slot = ring_slot(i, stages)
            q_tile, do_tile = smem.q.at[slot], smem.do.at[slot]
            ahead = advance(position)
            cp_async.wait(0)
            barrier()
            if stages > 1:
                start_copy(ahead, i + 1)

            def each_row(ref):
                numbers = plgpu.load(ref.at[slot], layout=layout.reduce(0))
                return by_col(numbers, shape, layout)

            def masked(s):
                # One branch around the masks, which few tiles need.
                cut = functools.partial(tile.masked, j=t, layout=layout)
                return lax.cond(tile.is_full(t), lambda s: s, cut, s)

            def score_gradients():
                start = zeros(shape, layout)
                s = masked(add_product(start, own_k, q_tile, contraction=H, columns=True))
                p = jnp.exp2(s * (scale * LOG2E) - each_row(smem.lse))
                dp = add_product(start, own_v, do_tile, contraction=H, columns=True)
                fragments.store_product(own_p, p.astype(dtype), M_WARPS)
                ds = p * (dp - each_row(smem.delta))
                fragments.store_product(own_ds, ds.astype(dtype), M_WARPS)

            def no_score_gradients():
                fragments.store_product(own_ds, zeros(shape, layout).astype(dtype), M_WARPS)

            def key_gradients(dk_acc, dv_acc):
                sizes = {"contraction": tiles.block_q, "columns": False}
                dv_acc = add_product(dv_acc, own_p, do_tile, **sizes)
                return add_product(dk_acc, own_ds, q_tile, **sizes), dv_acc

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
                start_copy(ahead, i + 1)
            if with_dq:
                for part in range(dq_parts):
                    columns = pl.ds(part * dq_columns, warpgroups * dq_columns)
                    dq_acc = zeros((tiles.block_q, dq_columns), layout)
                    for c in range(tiles.block_kv // MMA_K):
                        dq_acc = plgpu.mma(
                            dq_acc,
                            fragments.load_rows(smem.ds, c, transposed=True, m_warps=M_WARPS),
                            fragments.load_rows(
                                smem.k.at[:, columns], c, warpgroups=warpgroups, m_warps=M_WARPS
                            ),
                        )
                    gmem.add_rows(
                        dq,
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
        cp_async.store_rows(smem.v, dv, key, kv_head, warpgroups=warpgroups)
        cp_async.store_rows(smem.k, dk, key, kv_head, warpgroups=warpgroups)

    run = launch(
        kernel,
        name="flash_backward_mma" if with_dq else "flash_backward_dkv_mma",
        programs=key_tiles * K,
        scratch=scratch(H, dtype, tiles),
        out=(jax.ShapeDtypeStruct((C, K, H), dtype),) * 2,
        warpgroups=warpgroups,
    )
    # A tile of queries may reach beyond the last of them.
    stats = [jnp.pad(x.reshape(-1), (0, tiles.block_q)) for x in (lse_NR, delta_NR)]
    sums = []
    if with_dq:
        # Without the barrier XLA fills the zeros of all layers of a model in one pass, before the
        # first layer's backward.
        zero, stats = lax.optimization_barrier((jnp.float32(0), stats))
        eights = -(-(R + tiles.block_q) // 8)
        sums = [jax.new_ref(jnp.broadcast_to(zero, (eights, N, 8 * H)))]
    arrays = work.work, work.row_bounds, *optional_arrays(work)
    dk, dv = run(q_RNH, k_CKH, v_CKH, do_RNH, *stats, *sums, *arrays)
    if not with_dq:
        return None, dk, dv
    dq = gmem.in_rows(sums[0][...], H, vector=tiles.vector)[:R]
    return (dq * scale).astype(dtype), dk, dv
