"""The dq kernel of the deterministic backward: queries own their gradient, no sum leaves a program.

R rows = B * T queries end to end, C columns = B * S keys, N query heads, K kv heads, H head dim.
A program owns a row tile as the forward kernel lays it out, `CONSUMERS * group` queries x `heads`
query heads of one kv head, and walks over the live tiles of keys: S = Q K^T, dP = dO V^T and
dQ += dS K, three products a tile. Scores are not transposed here, so dS goes from registers into
its product, and dQ stays in registers until it is stored, once, in the inputs' dtype.

| barrier | arrives                         | waits         | asserts                           |
| ------- | ------------------------------- | ------------- | --------------------------------- |
| own     | copies of Q and dO by heads, of | all consumers | what belongs to the rows is here  |
|         | the rows' ranges and numbers    |               |                                   |
| k_full  | copy of K                       | all consumers | the stage holds K                 |
| k_free  | every consumer after its dS K   | producer      | the stage of K may be overwritten |
| v_full  | copy of V                       | all consumers | the stage holds V                 |
| v_free  | every consumer after its dO V^T | producer      | the stage of V may be overwritten |
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn import block_map
from jaxattn.block_map import BlockMap
from jaxattn.pallas import softmax
from jaxattn.pallas.launch import CONSUMER_REGISTERS, PRODUCER, PRODUCER_REGISTERS, launch
from jaxattn.pallas.smem import ring_slot, swizzled
from jaxattn.pallas.softmax import LOG2E, ROW, by_row
from jaxattn.pallas.tiles import CONSUMERS, WARPGROUP_ROWS, DqTiles

# What the softmax's gradient needs of each row, in this order.
LSE, DELTA = range(2)


def scratch(head_dim: int, dtype: jnp.dtype, tiles: DqTiles) -> dict:
    """Shared memory and barriers of one program."""
    own = plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, head_dim), dtype, transforms=swizzled(dtype))
    kv = (tiles.stages, tiles.block_kv, head_dim)
    full = plgpu.Barrier(num_barriers=tiles.stages)
    free = plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=CONSUMERS)
    return {
        "q_smem": own,
        "do_smem": own,
        "k_smem": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        "v_smem": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        "ends_smem": plgpu.SMEM((CONSUMERS, 2, WARPGROUP_ROWS), jnp.int32),
        "stats_smem": plgpu.SMEM((CONSUMERS, 2, WARPGROUP_ROWS), jnp.float32),
        "own": plgpu.Barrier(num_arrivals=2 * CONSUMERS * tiles.heads + 2),
        "k_full": full,
        "k_free": free,
        "v_full": full,
        "v_free": free,
    }


def query_gradient(
    q_RNH: Float[Array, "R N H"],
    k_CKH: Float[Array, "C K H"],
    v_CKH: Float[Array, "C K H"],
    do_RNH: Float[Array, "R N H"],
    lse_NR: Float[Array, "N rows"],
    delta_NR: Float[Array, "N rows"],
    work: BlockMap,
    *,
    scale: float,
    tiles: DqTiles,
) -> Float[Array, "R N H"]:
    """Runs the kernel.

    Args:
      q_RNH: queries, bf16 or fp16; H is 64 or 128.
      k_CKH: keys, same dtype.
      v_CKH: values, same dtype.
      do_RNH: gradient of the output, same dtype.
      lse_NR: log-sum-exp in units of log 2; its rows beyond R are not read for any visible pair.
      delta_NR: what is subtracted from dP, fp32, same shape as lse.
      work: `query_map` for these tiles.
      scale: above 0.
      tiles: the tile sizes that `work` was made for.

    Returns:
      dq in the inputs' dtype, the same bits in every run: each is summed in fp32 by one program,
      over the key tiles in their order.
    """
    R, N, H = q_RNH.shape
    K = k_CKH.shape[1]
    dtype, f32 = q_RNH.dtype, jnp.float32
    queries = CONSUMERS * tiles.group  # of a row tile
    row_tiles = -(-R // queries)
    by_id, by_list = work.row_ids is not None, work.cols is not None

    def kernel(q_gmem, k_gmem, v_gmem, do_gmem, stats_gmem, work_gmem, ends_gmem, *refs, **smem):
        # The columns to visit, if there is a pattern; ids of rows and columns, if documents.
        *optional, dq_gmem = refs
        cols_gmem, ids_gmem = optional[:by_list], optional[by_list:]
        q_smem, do_smem, k_smem, v_smem = (smem[f"{x}_smem"] for x in ("q", "do", "k", "v"))
        ends_smem, stats_smem, own = smem["ends_smem"], smem["stats_smem"], smem["own"]
        k_full, k_free, v_full, v_free = (smem[x] for x in ("k_full", "k_free", "v_full", "v_free"))
        wg = lax.axis_index("wg")
        program = lax.axis_index("program")
        # Longest row tile first within a head; heads one after another, so that the K and V of a
        # head stay in the L2 cache while all its row tiles pass over them.
        row, tile_head = lax.rem(program, row_tiles), lax.div(program, row_tiles)
        row_tile, start, count = (
            work_gmem[row, 0, i] for i in (block_map.TILE, block_map.START, block_map.COUNT)
        )

        def col_of(j):
            """First column of the j-th tile of the row tile: they are neighbours, or listed."""
            col = cols_gmem[0][start + j] if by_list else start + j * tiles.block_kv
            return pl.multiple_of(col, block_map.ALIGN)

        def by_head(consumer, h):
            """Where a head's rows of a consumer are in memory, and in its tile (head-major)."""
            token = pl.multiple_of(row_tile * queries + consumer * tiles.group, block_map.ALIGN)
            at = pl.ds(token, tiles.group), tile_head * tiles.heads + h
            return at, pl.ds(h * tiles.group, tiles.group)

        @pl.when(wg == PRODUCER)
        def producer():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            # 1. What belongs to the rows.
            plgpu.copy_gmem_to_smem(ends_gmem.at[row], ends_smem, own)
            plgpu.copy_gmem_to_smem(stats_gmem.at[row_tile, tile_head], stats_smem, own)
            for source, target in ((q_gmem, q_smem), (do_gmem, do_smem)):
                for consumer in range(CONSUMERS):
                    for h in range(tiles.heads):
                        at, rows = by_head(consumer, h)
                        plgpu.copy_gmem_to_smem(source.at[at], target.at[consumer, rows], own)

            # 2. K and V of every column tile that some row of the tile sees.
            @pl.loop(0, count)
            def _(j):
                slot = ring_slot(j, tiles.stages)
                source = pl.ds(col_of(j), tiles.block_kv), lax.div(tile_head * tiles.heads, N // K)

                def load(gmem, smem, free, full):
                    # Nothing to wait for in the first round.
                    pl.when(j >= tiles.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(gmem.at[source], smem.at[slot], full.at[slot])

                load(k_gmem, k_smem, k_free, k_full)
                load(v_gmem, v_smem, v_free, v_full)

        @pl.when(wg < CONSUMERS)
        def consumer():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            q, do, ends, stats = (x.at[wg] for x in (q_smem, do_smem, ends_smem, stats_smem))
            ids_decide, live_from, live_to, _, full_from, full_to = (
                work_gmem[row, wg, i] for i in range(block_map.BY_ID, block_map.FULL_TO + 1)
            )
            s_shape = (WARPGROUP_ROWS, tiles.block_kv)
            plgpu.barrier_wait(own)

            def each_column(stat):
                """A number of each row, for all columns of a score tile."""
                return by_row(plgpu.load(stats.at[stat], layout=ROW), s_shape)

            def skip(j, _):
                """A tile that only the other consumer needs: free it unread."""
                slot = ring_slot(j, tiles.stages)
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return ()

            def wait_for_k(j):
                @pl.when(j < live_to)
                def _():
                    plgpu.barrier_wait(k_full.at[ring_slot(j, tiles.stages)])

            def masked(s, j):
                ids = None
                if by_id:
                    row_ids, col_ids = ids_gmem
                    cols = col_ids.at[pl.ds(col_of(j), tiles.block_kv)]
                    ids = ids_decide, row_ids.at[row, wg], cols
                return softmax.mask_scores(
                    s, col_of(j), ends, below=j < full_from, above=j >= full_to, ids=ids
                )

            def accumulate(dq_acc):
                def step(j, _):
                    slot = ring_slot(j, tiles.stages)
                    k, v = k_smem.at[slot], v_smem.at[slot]

                    def score_gradients(s_acc, dp_acc):
                        plgpu.wgmma(s_acc, q, k.T)
                        plgpu.wgmma(dp_acc, do, v.T)
                        # 2. P = exp2(S - lse), while dP runs; dS = P * (dP - delta).
                        s = masked(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), j)
                        p = jnp.exp2(s * (scale * LOG2E) - each_column(LSE))
                        # The wait for the next K is the branch without which ptxas moves the
                        # wait for dP up to before the exponentials.
                        p = lax.optimization_barrier(p)
                        wait_for_k(j + 1)
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                        return (p * (dp - each_column(DELTA))).astype(dtype)

                    # 1. S = Q K^T and dP = dO V^T. The waits stand outside the accumulators'
                    # scopes, or ptxas fills them with zeros register by register.
                    plgpu.barrier_wait(v_full.at[slot])
                    ds16 = pl.run_scoped(score_gradients, *[plgpu.ACC(s_shape, f32)] * 2)
                    plgpu.barrier_arrive(v_free.at[slot])
                    # 3. dQ += dS K.
                    plgpu.wgmma(dq_acc, ds16, k)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(k_free.at[slot])
                    return ()

                wait_for_k(live_from)
                lax.fori_loop(live_from, live_to, step, ())
                return dq_acc[...]

            lax.fori_loop(0, live_from, skip, ())
            dq = pl.run_scoped(accumulate, plgpu.ACC((WARPGROUP_ROWS, H), f32))
            lax.fori_loop(live_to, count, skip, ())
            # 4. Store, staged where Q was: nobody else reads this consumer's part.
            q[...] = (dq * scale).astype(dtype)
            plgpu.commit_smem()
            for h in range(tiles.heads):
                at, rows = by_head(wg, h)
                plgpu.copy_smem_to_gmem(q.at[rows], dq_gmem.at[at], commit_group=False)
            plgpu.commit_smem_to_gmem_group()
            plgpu.wait_smem_to_gmem(0)

    run = launch(
        kernel,
        name="flash_backward_dq",
        programs=row_tiles * (N // tiles.heads),
        scratch=scratch(H, dtype, tiles),
        out=jax.ShapeDtypeStruct((R, N, H), dtype),
    )
    stats = _by_tile((lse_NR, delta_NR), row_tiles, tiles)
    optional = [x for x in (work.cols, work.row_ids, work.col_ids) if x is not None]
    return run(q_RNH, k_CKH, v_CKH, do_RNH, stats, work.work, work.ends, *optional)


def _by_tile(
    stats: tuple[Float[Array, "N rows"], ...], row_tiles: int, tiles: DqTiles
) -> Float[Array, "tiles tile_heads consumers stats tile_rows"]:
    """The rows' numbers in the order of the tiles, so that one copy fetches those of a program."""
    num_heads, rows = stats[0].shape
    beyond = row_tiles * CONSUMERS * tiles.group - rows
    x = jnp.pad(jnp.stack(stats), ((0, 0), (0, 0), (0, max(beyond, 0))))
    x = x[..., : row_tiles * CONSUMERS * tiles.group]
    x = x.reshape(
        len(stats), num_heads // tiles.heads, tiles.heads, row_tiles, CONSUMERS, tiles.group
    )
    x = x.transpose(3, 1, 4, 0, 2, 5)
    return x.reshape(row_tiles, num_heads // tiles.heads, CONSUMERS, len(stats), WARPGROUP_ROWS)
