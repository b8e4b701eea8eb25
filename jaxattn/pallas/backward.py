"""The backward kernel: one pass over the keys, five products a tile, dQ by fp32 reduce-add.

R rows = B * T queries end to end, C columns = B * S keys, N query heads, K kv heads, G = N / K,
H head dim. A program owns one tile of `block_kv` keys of one kv head (64 keys a warpgroup), keeps
its dK and dV in registers, and walks over the live tiles of queries of the group's G heads, in an
order for the L2 cache (`each_tile`). Scores are transposed, S^T [keys, queries], so that P^T and
dS^T can go from registers into dV += P^T dO and dK += dS^T Q; dS goes through shared memory for
dQ += dS K.

| barrier   | arrives                        | waits     | asserts                            |
| --------- | ------------------------------ | --------- | ---------------------------------- |
| kv_full   | copies of K and V              | consumers | K and V of the program are here    |
| ends_full | copies of the two ends         | consumers | the keys' visible ranges are here  |
| q_full    | copies of Q and lse            | consumers | the stage holds Q and lse          |
| q_free    | each consumer after its dK     | producer  | the stage of Q may be overwritten  |
| do_full   | copies of dO and delta         | consumers | the stage holds dO and delta       |
| do_free   | each consumer after its dV     | producer  | the stage of dO may be overwritten |
| ds_full   | each consumer, its half stored | consumers | the slot holds dS^T of all keys    |

All have two arrivals, so one Barrier object serves them: one register of phases instead of six.
dS needs no "free" barrier, because it has two slots: a warpgroup can only store into a slot again
after the ds_full in between, which the other reaches after its dQ has read the slot.

Without dQ (`with_dq=False`, for the deterministic backward, whose dQ `backward_dq` computes) it
is a kernel of four products: nothing of dS goes through shared memory, ds_full is not used.
"""

import enum
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn import block_map
from jaxattn.block_map import BlockMap
from jaxattn.pallas import lanes, softmax
from jaxattn.pallas.launch import CONSUMER_REGISTERS, PRODUCER, PRODUCER_REGISTERS, launch
from jaxattn.pallas.softmax import COL, LOG2E, by_col
from jaxattn.pallas.sync import ring_slot, swizzled
from jaxattn.pallas.tiles import CONSUMERS, WARPGROUP_ROWS, BackwardTiles

# Tiles of queries that a program walks over in one head before it turns to the next.
STRETCH = 32


class _Barriers(enum.IntEnum):
    """First index of each barrier; those of a ring have one index a stage."""

    KV_FULL = 0
    ENDS_FULL = 1
    DS_FULL = 2
    RINGS = 3


class _Ring:
    """A ring of barriers inside the one Barrier object."""

    def __init__(self, barriers, index: int, stages: int):
        self._barriers, self._first = barriers, _Barriers.RINGS + index * stages
        self._stages = stages

    def __getitem__(self, i):
        return self._barriers.at[self._first + ring_slot(i, self._stages)]


def scratch(head_dim: int, dtype: jnp.dtype, tiles: BackwardTiles, *, with_dq: bool = True) -> dict:
    """Shared memory and barriers of one program."""
    q, kv, stages = tiles.block_q, tiles.block_kv, tiles.stages
    dq_rows, dq_cols = dq_part(head_dim, tiles)

    def tile(*shape, dtype: Any = dtype):
        return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype))

    for_dq = {
        "ds_smem": tile(stages, q, kv),
        "dq_smem": tile(CONSUMERS, dq_rows, dq_cols, dtype=jnp.float32),
    }
    return {
        "k_smem": tile(kv, head_dim),
        "v_smem": tile(kv, head_dim),
        "q_smem": tile(stages, q, head_dim),
        "do_smem": tile(stages, q, head_dim),
        **(for_dq if with_dq else {}),
        "lse_smem": plgpu.SMEM((stages, q), jnp.float32),
        "delta_smem": plgpu.SMEM((stages, q), jnp.float32),
        "ends_smem": plgpu.SMEM((2, kv), jnp.int32),
        "barriers": plgpu.Barrier(num_arrivals=2, num_barriers=_Barriers.RINGS + 4 * stages),
    }


def dq_part(head_dim: int, tiles: BackwardTiles) -> tuple[int, int]:
    """Rows and columns of dQ that one consumer computes, over all keys of the tile.

    Half of the head dim each, which halves what they add to memory against partial sums over
    keys; at head dim 64, where half would be narrower than a swizzled row, half of the queries.
    """
    if head_dim // CONSUMERS >= WARPGROUP_ROWS:
        return tiles.block_q, head_dim // CONSUMERS
    return tiles.block_q // CONSUMERS, head_dim


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
    """Runs the kernel.

    Args:
      q_RNH: queries, bf16 or fp16; H is 64 or 128.
      k_CKH: keys, same dtype.
      v_CKH: values, same dtype.
      do_RNH: gradient of the output, same dtype.
      lse_NR: log-sum-exp as the forward kernel returns it; its rows beyond R are not read for
        any visible pair.
      delta_NR: what is subtracted from dP: the sum over H of o * do, less the gradient of the
        natural log-sum-exp where there is one; fp32, same shape as lse.
      work: `key_map` for these tiles.
      scale: above 0.
      tiles: the tile sizes that `work` was made for.
      with_dq: whether to compute dq, too.

    Returns:
      dq (or None), dk, dv in the inputs' dtype. dk and dv are the same bits in every run; dq is
      summed in fp32 in the order in which programs finish, so its last bits may differ.
    """
    R, N, H = q_RNH.shape
    C, K = k_CKH.shape[:2]
    dtype, f32 = q_RNH.dtype, jnp.float32
    stride = lse_NR.shape[1]
    col_tiles = -(-C // tiles.block_kv)  # "rows" of the block map are keys here
    dq_rows, dq_cols = dq_part(H, tiles)
    by_id, by_list = work.row_ids is not None, work.cols is not None

    def kernel(q_gmem, k_gmem, v_gmem, do_gmem, lse_gmem, delta_gmem, *refs, **smem):
        # The queries to visit, if there is a pattern; ids of keys and queries, if documents.
        dq_gmem: Any
        dq_gmem, *refs = refs if with_dq else (None, *refs)
        work_gmem, ends_gmem, *optional, dk_gmem, dv_gmem = refs
        cols_gmem, ids_gmem = optional[:by_list], optional[by_list:]
        k_smem, v_smem, q_smem, do_smem = (smem[f"{x}_smem"] for x in ("k", "v", "q", "do"))
        lse_smem, delta_smem, ends_smem = (smem[f"{x}_smem"] for x in ("lse", "delta", "ends"))
        barriers = smem["barriers"]
        kv_full, ends_full = barriers.at[_Barriers.KV_FULL], barriers.at[_Barriers.ENDS_FULL]
        ds_full = barriers.at[_Barriers.DS_FULL]
        q_full, q_free, do_full, do_free = (_Ring(barriers, i, tiles.stages) for i in range(4))

        warpgroup = lax.axis_index("wg")
        program = lax.axis_index("program")
        # Longest key tile first within a kv head, and one kv head after another: those that run at
        # once walk over the queries of the same group.
        row, kv_head = lax.rem(program, col_tiles), lax.div(program, col_tiles)
        key_tile, start, count = (
            work_gmem[row, 0, i] for i in (block_map.TILE, block_map.START, block_map.COUNT)
        )
        key = key_tile * tiles.block_kv

        def head_cols(head):
            return pl.ds(head * H, H)

        def each_tile(body):
            """Runs body(query head, query tile, how many came before).

            A stretch of queries after another, from the last to the first, and each for all heads.
            The programs that run at once own neighbouring keys, which the same last queries see:
            so they read the same few tiles of Q and dO, and add to the same tiles of dQ, while
            these are in the L2 cache. Head after head they would drift apart, programs of fewer
            tiles ahead, until they were in different heads.
            """
            heads = jnp.int32(N // K)

            @pl.loop(0, lax.div(count + STRETCH - 1, jnp.int32(STRETCH)) * heads)
            def _(i):
                stretch, g = lax.div(i, heads), lax.rem(i, heads)
                done = stretch * STRETCH  # of the tiles, in every head
                length = jnp.minimum(count - done, STRETCH)
                before = done * heads + length * g

                @pl.loop(0, length)
                def _(j):
                    body(kv_head * heads + g, count - 1 - done - j, before + j)

        def column(t):
            """First query of the t-th tile: they are neighbours, or listed."""
            return cols_gmem[0][start + t] if by_list else start + t * tiles.block_q

        def first_query(t):
            return pl.multiple_of(column(t), block_map.ALIGN)

        @pl.when(warpgroup == PRODUCER)
        def producer():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            keys = pl.ds(key, tiles.block_kv), head_cols(kv_head)
            plgpu.copy_gmem_to_smem(k_gmem.at[keys], k_smem, kv_full)
            plgpu.copy_gmem_to_smem(v_gmem.at[keys], v_smem, kv_full)
            for i in range(2):
                plgpu.copy_gmem_to_smem(ends_gmem.at[row, 0, i], ends_smem.at[i], ends_full)

            def load(head, t, i):
                slot = ring_slot(i, tiles.stages)
                token = first_query(t)
                rows, cols = pl.ds(token, tiles.block_q), head_cols(head)
                stats = pl.ds(pl.multiple_of(head * stride + token, block_map.ALIGN), tiles.block_q)

                def wait_until(free):
                    # Nothing to wait for in the first round.
                    pl.when(i >= tiles.stages)(lambda: plgpu.barrier_wait(free[i]))

                wait_until(q_free)
                plgpu.copy_gmem_to_smem(q_gmem.at[rows, cols], q_smem.at[slot], q_full[i])
                plgpu.copy_gmem_to_smem(lse_gmem.at[stats], lse_smem.at[slot], q_full[i])
                wait_until(do_free)
                plgpu.copy_gmem_to_smem(do_gmem.at[rows, cols], do_smem.at[slot], do_full[i])
                plgpu.copy_gmem_to_smem(delta_gmem.at[stats], delta_smem.at[slot], do_full[i])

            each_tile(load)

        def consumer(wg):
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            own = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
            k_own, v_own = k_smem.at[own], v_smem.at[own]
            ids_decide, full_from, full_to = (
                work_gmem[row, 0, i]
                for i in (block_map.BY_ID, block_map.FULL_FROM, block_map.FULL_TO)
            )
            full_tiles = jnp.maximum(full_to - full_from, 0).astype(jnp.uint32)
            plgpu.barrier_wait(kv_full)
            plgpu.barrier_wait(ends_full)

            def masked(s, t):
                query = column(t)
                ids = None
                if by_id:
                    key_ids, query_ids = ids_gmem
                    ids = (
                        ids_decide,
                        key_ids.at[row, 0, own],
                        query_ids.at[pl.ds(query, s.shape[1])],
                    )

                def cut(s):
                    ends, below, above = ends_smem.at[:, own], t < full_from, t >= full_to
                    return softmax.mask_scores(s, query, ends, below=below, above=above, ids=ids)

                # One branch around all that few tiles need, by one comparison, which saves the
                # registers that spilled: as an unsigned number t - full_from is large below 0.
                whole = (t - full_from).astype(jnp.uint32) < full_tiles
                return lax.cond(whole, lambda s: s, cut, s)

            def dq_operands(ds_slot):
                """Both factors of dQ = dS K: this consumer's columns of K, or its queries of dS."""
                if dq_cols < H:
                    return ds_slot, k_smem.at[:, pl.ds(wg * dq_cols, dq_cols)]
                return ds_slot.at[pl.ds(wg * dq_rows, dq_rows)], k_smem

            def dq_target(head, t):
                token, col = first_query(t), head * H
                if dq_cols < H:
                    return dq_gmem.at[pl.ds(token, dq_rows), pl.ds(col + wg * dq_cols, dq_cols)]
                return dq_gmem.at[pl.ds(token + wg * dq_rows, dq_rows), pl.ds(col, H)]

            def accumulate(dk_acc, dv_acc):
                def step(head, t, i):
                    slot = ring_slot(i, tiles.stages)
                    q_tile, do_tile = q_smem.at[slot], do_smem.at[slot]
                    ds_tile: Any = smem["ds_smem"].at[slot] if with_dq else None
                    s_shape = (WARPGROUP_ROWS, tiles.block_q)

                    def probabilities(s_acc, dp_acc):
                        # 2. P^T = exp2(S^T - lse), while dP^T runs.
                        s = masked(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), t)
                        lse = plgpu.load(lse_smem.at[slot], layout=COL)
                        p = jnp.exp2(s * (scale * LOG2E) - by_col(lse, s_shape))
                        p16 = p.astype(dtype)
                        # 3. dS^T = P^T * (dP^T - delta), stored for dQ.
                        delta = plgpu.load(delta_smem.at[slot], layout=COL)
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                        ds16 = (p * (dp - by_col(delta, s_shape))).astype(dtype)
                        if with_dq:
                            lanes.store_transposed(ds_tile.at[:, own], ds16)
                        # 4. dV += P^T dO.
                        plgpu.wgmma(dv_acc, p16, do_tile)
                        return ds16

                    def score_gradients(dp_acc, s_acc):
                        plgpu.wgmma(dp_acc, v_own, do_tile.T)
                        return probabilities(s_acc, dp_acc)

                    def scores(s_acc):
                        plgpu.wgmma(s_acc, k_own, q_tile.T)
                        plgpu.barrier_wait(do_full[i])
                        return pl.run_scoped(
                            functools.partial(score_gradients, s_acc=s_acc),
                            plgpu.ACC(s_shape, f32),
                        )

                    def query_gradients(dq_acc, ds16):
                        # 5. dQ = dS K and dK += dS^T Q.
                        plgpu.wgmma(dq_acc, *dq_operands(ds_tile))
                        plgpu.wgmma(dk_acc, ds16, q_tile)
                        plgpu.wgmma_wait(2)  # dV is done
                        plgpu.barrier_arrive(do_free[i])
                        # 6. Add dQ to memory while dK runs. The add before is long done.
                        dq_own = smem["dq_smem"].at[wg]
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        dq_own[...] = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(dq_own, dq_target(head, t), reduction_op="add")
                        plgpu.wgmma_wait(0)  # dK is done
                        plgpu.barrier_arrive(q_free[i])

                    def key_gradients(ds16):
                        # 5. dK += dS^T Q alone. The fence stands between this consumer's reads
                        # of lse and delta and the copies that overwrite them.
                        plgpu.wgmma(dk_acc, ds16, q_tile)
                        plgpu.commit_smem()
                        plgpu.wgmma_wait(1)  # dV is done
                        plgpu.barrier_arrive(do_free[i])
                        plgpu.wgmma_wait(0)  # dK is done
                        plgpu.barrier_arrive(q_free[i])

                    # 1. S^T = K Q^T and dP^T = V dO^T. The waits for Q and dS stand outside the
                    # accumulators' scopes, or ptxas fills them with zeros register by register.
                    plgpu.barrier_wait(q_full[i])
                    ds16 = pl.run_scoped(scores, plgpu.ACC(s_shape, f32))
                    if not with_dq:
                        return key_gradients(ds16)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_full)
                    plgpu.barrier_wait(ds_full)
                    pl.run_scoped(
                        functools.partial(query_gradients, ds16=ds16),
                        plgpu.ACC((dq_rows, dq_cols), f32),
                    )

                each_tile(step)
                return dk_acc[...], dv_acc[...]

            dk, dv = pl.run_scoped(accumulate, *[plgpu.ACC((WARPGROUP_ROWS, H), f32)] * 2)
            # Stage both through V's memory, one after the other: the other consumer may still
            # read K for its dQ, but nobody reads this warpgroup's rows of V any more.
            keys = pl.ds(key + wg * WARPGROUP_ROWS, WARPGROUP_ROWS), head_cols(kv_head)
            for gradient, target in ((dv, dv_gmem), (dk * scale, dk_gmem)):
                v_own[...] = gradient.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(v_own, target.at[keys])
                # Read is enough, also for the last: the end of the kernel is what makes it visible.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        # A copy of the code for each warpgroup: with its index a constant, the descriptors of
        # K and V are constants too. As a run-time value it measured 0 to 4% slower.
        for index in range(CONSUMERS):
            pl.when(warpgroup == index)(functools.partial(consumer, index))

    run = launch(
        kernel,
        name="flash_backward" if with_dq else "flash_backward_dkv",
        programs=col_tiles * K,
        scratch=scratch(H, dtype, tiles, with_dq=with_dq),
        out=(jax.ShapeDtypeStruct((C, K * H), dtype),) * 2,
    )
    flat = [x.reshape(x.shape[0], -1) for x in (q_RNH, k_CKH, v_CKH, do_RNH)]
    dq_sum = []
    if with_dq:
        # Without the barrier XLA fills the zeros of all layers of a model in one pass, before the
        # first layer's backward: 256 MiB each at 32k tokens of 16 heads, on top of the peak.
        delta_NR, zero = lax.optimization_barrier((delta_NR, f32(0)))
        dq_sum = [jax.new_ref(jnp.broadcast_to(zero, (R, N * H)))]
    optional = [x for x in (work.cols, work.row_ids, work.col_ids) if x is not None]
    dk, dv = run(
        *flat,
        lse_NR.reshape(-1),
        delta_NR.reshape(-1),
        *dq_sum,
        work.work,
        work.ends,
        *optional,
    )
    dq = [(x[...] * scale).astype(dtype).reshape(R, N, H) for x in dq_sum]
    return dq[0] if dq else None, dk.reshape(C, K, H), dv.reshape(C, K, H)
