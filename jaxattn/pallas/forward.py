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
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn import block_map
from jaxattn.block_map import BlockMap
from jaxattn.pallas import softmax
from jaxattn.pallas.schedule import persistent_schedule
from jaxattn.pallas.softmax import PARTS, ROW, TILE, by_row
from jaxattn.pallas.sync import ring_slot, swizzled
from jaxattn.pallas.tiles import CONSUMERS, WARPGROUP_ROWS, ForwardTiles

# Programs of the persistent grid: one on each multiprocessor of an H100 or H200.
PROGRAMS = 132
PRODUCER = CONSUMERS
# Registers a thread: the producer needs few, 24 + 2 * 240 = 3 * 168 is all there is.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
# Slots for what belongs to an item: its Q, its row of the work list, its rows' visible ranges. With
# two, the producer fetches an item while the one before is still worked on.
ITEM_SLOTS = 2
# Flags for items to be done again: one each, or where a program has more items, for neighbours.
AGAIN = 127
# Keys of a short tile: the fewest that P V takes at a time from this layout of V.
SHORT = 64


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
    two_passes = dtype == jnp.bfloat16

    def kernel(q_gmem, k_gmem, v_gmem, schedule_gmem, work_gmem, ends_gmem, *refs, **smem):
        # The columns to visit, if there is a pattern; ids of rows and columns, if documents.
        *optional, o_gmem, lse_gmem = refs
        cols_gmem, ids_gmem = optional[:by_list], optional[by_list:]
        q_smem, k_smem, v_smem = smem["q_smem"], smem["k_smem"], smem["v_smem"]
        work_smem, ends_smem = smem["work_smem"], smem["ends_smem"]
        lse_smem = smem["lse_smem"]
        q_full, k_full, v_full = smem["q_full"], smem["k_full"], smem["v_full"]
        q_free, k_free, v_free = smem["q_free"], smem["k_free"], smem["v_free"]
        again_smem, again_full = smem["again_smem"], smem["again_full"]
        wg = lax.axis_index("wg")
        program = lax.axis_index("program")

        def column(start, j):
            """First key of the j-th tile of an item: they are neighbours, or listed."""
            return cols_gmem[0][start + j] if by_list else start + j * tiles.block_kv

        def ends_short(columns, j, careful):
            """Whether the j-th tile, where these columns may end, is a short one.

            Never in the second pass, which runs too seldom for more code.
            """
            if tiles.block_kv == SHORT or careful and two_passes:
                return False
            return columns - j * tiles.block_kv <= SHORT

        def item_slot(i, consumer):
            return lax.rem(i, jnp.int32(ITEM_SLOTS)) * CONSUMERS + consumer

        items = schedule_gmem[program, 0]

        def each_item(body, load, between):
            """Runs body(i, head, place in the work list, loaded, column tiles before, careful).

            For all items, then `between`, and for those that are flagged: i goes on counting.
            """

            def item(n):
                # The load ahead of the last item is the filling of the schedule's row.
                at = schedule_gmem[program, 1 + jnp.minimum(n, schedule.shape[1] - 2)]
                row, head = lax.rem(at, row_tiles), lax.div(at, row_tiles)
                return row, head, load(row)

            def step(i, carry):
                (row, head, loaded), done = carry
                ahead = item(i + 1)  # read now, so that the next item need not wait for it
                return ahead, done + body(i, head, row, loaded, done, careful=not two_passes)

            _, done = lax.fori_loop(0, items, step, (item(jnp.int32(0)), jnp.int32(0)))
            if not two_passes:
                return

            def flagged(place):
                return (again_smem[0, place] | again_smem[1, place]) != 0

            def repeat(n, carry):
                def run(i, done):
                    row, head, loaded = item(n)
                    return i + 1, done + body(i, head, row, loaded, done, careful=True)

                return lax.cond(flagged(flag_of(n)), run, lambda *carry: carry, *carry)

            between()
            plgpu.barrier_wait(again_full)

            @pl.when(flagged(AGAIN))
            def _():
                lax.fori_loop(0, items, repeat, (items, done))

        def flag_of(n):
            """Which flag is that of the program's n-th item."""
            return lax.div(n, jnp.int32(-(-(schedule.shape[1] - 1) // AGAIN)))

        @pl.when(wg == PRODUCER)
        def producer():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def load(row):
                fields = (block_map.TILE, block_map.START, block_map.COUNT, block_map.COLUMNS)
                return [work_gmem[row, 0, i] for i in fields]

            def body(i, head, row, loaded, done, careful):
                row_tile, start, count, columns = loaded
                kv_head = lax.div(head * tiles.heads, N // K)
                # 1. The item: metadata, and Q by one copy a head (a warpgroup's rows are
                # head-major).
                for consumer in range(CONSUMERS):
                    slot = item_slot(i, consumer)
                    full, parity = q_full.at[slot], lax.rem(i, jnp.int32(ITEM_SLOTS))
                    plgpu.barrier_wait(q_free.at[slot])
                    plgpu.copy_gmem_to_smem(
                        work_gmem.at[row, consumer],
                        work_smem.at[parity, consumer, pl.ds(0, block_map.FIELDS)],
                        full,
                    )
                    plgpu.copy_gmem_to_smem(
                        ends_gmem.at[row, consumer], ends_smem.at[parity, consumer], full
                    )
                    token = pl.multiple_of(
                        row_tile * queries + consumer * tiles.group, block_map.ALIGN
                    )
                    for h in range(tiles.heads):
                        plgpu.copy_gmem_to_smem(
                            q_gmem.at[pl.ds(token, tiles.group), head * tiles.heads + h],
                            q_smem.at[parity, consumer, pl.ds(h * tiles.group, tiles.group)],
                            full,
                        )

                # 2. K and V of every column tile that some row of the tile sees. V comes one tile
                # behind K: its stage is free only after P V, a softmax later than the stage of K,
                # and the next K, which is needed first, must not wait for that.
                @pl.loop(0, count + 1)
                def _(j):
                    def copy(j, gmem, smem, full, free):
                        slot = ring_slot(done + j, tiles.stages)
                        col = pl.multiple_of(column(start, j), block_map.ALIGN)
                        plgpu.barrier_wait(free.at[slot])

                        def keys(size):
                            plgpu.copy_gmem_to_smem(
                                gmem.at[pl.ds(col, size), kv_head],
                                smem.at[slot, pl.ds(0, size)],
                                full.at[slot],
                            )

                        short = ends_short(columns, j, careful)
                        either(short, lambda: keys(SHORT), lambda: keys(tiles.block_kv))

                    pl.when(j < count)(lambda: copy(j, k_gmem, k_smem, k_full, k_free))
                    pl.when(j > 0)(lambda: copy(j - 1, v_gmem, v_smem, v_full, v_free))

                return count

            each_item(body, load, between=lambda: None)

        @pl.when(wg < CONSUMERS)
        def consumer():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            for slot in range(ITEM_SLOTS):
                plgpu.barrier_arrive(q_free.at[item_slot(jnp.int32(slot), wg)])
            for slot in range(tiles.stages):
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
            again_own = again_smem.at[wg]
            if two_passes:
                again_own[...] = jnp.zeros((AGAIN + 1,), jnp.int32)
                plgpu.commit_smem()

            def body(i, head, row, _, done, careful):
                slot = lax.rem(i, jnp.int32(ITEM_SLOTS))
                q, ends = q_smem.at[slot, wg], ends_smem.at[slot, wg]
                plgpu.barrier_wait(q_full.at[item_slot(i, wg)])
                fields = [work_smem[slot, wg, field] for field in range(block_map.FULL_TO + 1)]
                row_tile, start, count, _, ids_decide, live_from, live_to, columns = fields[:8]
                full_from, full_to = fields[8:]
                last = live_to - 1
                short = ends_short(columns, last, careful)

                def slot_of(j):
                    return ring_slot(done + j, tiles.stages)

                def skip(j, _):
                    """A tile that only the other warpgroups need: free it unread."""
                    plgpu.barrier_wait(k_full.at[slot_of(j)])
                    plgpu.barrier_arrive(k_free.at[slot_of(j)])
                    plgpu.barrier_wait(v_full.at[slot_of(j)])
                    plgpu.barrier_arrive(v_free.at[slot_of(j)])
                    return ()

                def masked(s, j):
                    col = column(start, j)
                    ids = None
                    if by_id:
                        row_ids, col_ids = ids_gmem
                        ids = ids_decide, row_ids.at[row, wg], col_ids.at[pl.ds(col, s.shape[1])]
                    return softmax.mask_scores(
                        s, col, ends, below=j < full_from, above=j >= full_to, ids=ids
                    )

                def wait_for_k(j):
                    @pl.when(j < live_to)
                    def _():
                        plgpu.barrier_wait(k_full.at[slot_of(j)])

                def wait_for_v(j):
                    plgpu.barrier_wait(v_full.at[slot_of(j)])

                def keys(smem, j, size):
                    return smem.at[slot_of(j), pl.ds(0, size)]

                def first_tile(size):
                    """Scores and softmax of the first live tile: nothing to overlap with yet."""

                    def scores(s_acc):
                        plgpu.wgmma(s_acc, q, keys(k_smem, live_from, size).T)
                        return s_acc[...]

                    plgpu.barrier_wait(k_full.at[slot_of(live_from)])
                    s = pl.run_scoped(scores, plgpu.ACC((WARPGROUP_ROWS, size), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot_of(live_from)])
                    s = masked(s, live_from)
                    p, l, m = softmax.online_softmax(s, m_start, l_start, scale)[:3]
                    if size == tiles.block_kv:
                        wait_for_k(live_from + 1)

                    # The output of the item before, staged in its slot, has left by now.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_arrive(q_free.at[item_slot(i - 1, wg)])

                    return m, l, p.astype(dtype)

                def step(j, carry, size=tiles.block_kv):
                    """S = Q K_j^T and O += P V_(j-1) run while the softmax of tile j-1 is done."""
                    o, m, l, p = carry

                    def overlapped(refs):
                        o_acc, *state = refs

                        def scores(s_acc):
                            plgpu.wgmma(s_acc, q, keys(k_smem, j, size).T)
                            wait_for_v(j - 1)
                            plgpu.wgmma(o_acc, p, keys(v_smem, j - 1, tiles.block_kv))
                            return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # P V still runs

                        s = pl.run_scoped(scores, plgpu.ACC(s_shape, jnp.float32))
                        plgpu.barrier_arrive(k_free.at[slot_of(j)])
                        s = masked(s, j)
                        if careful:
                            new = softmax.online_softmax(s, m, l, scale)
                        else:
                            # Rows begin where some row's range does, nowhere else.
                            starts = functools.partial(softmax.first_offset, scale=scale)
                            first = lax.cond(j < full_from, starts, lambda _, m: m, s, m)
                            new = *softmax.offset_softmax(s, first, l, scale), first
                        # ptxas moves the wait for P V up to before the softmax, which undoes the
                        # overlap, unless a branch stands between: this wait is that branch. And P
                        # stays fp32 until P V is done, or ptxas serialises the two (C7513).
                        new = lax.optimization_barrier(new)
                        wait_for_k(j + 1) if size == tiles.block_kv else wait_for_v(j)
                        for ref, value in zip(state, new, strict=True):
                            ref[...] = value

                    s_shape = (WARPGROUP_ROWS, size)
                    no_p = plgpu.layout_cast(jnp.zeros(s_shape, jnp.float32), TILE)
                    state: Any = (plgpu.ACC.init(o), no_p, l, m, *([zeros] if careful else []))
                    o, p, l, m, *alpha = pl.run_state(overlapped)(state)
                    plgpu.barrier_arrive(v_free.at[slot_of(j - 1)])
                    if careful:
                        o = softmax.rescale(o, *alpha)
                    return o, m, l, p.astype(dtype)

                def last_product(o, p):
                    o_acc: Any = plgpu.ACC.init(o)
                    v = keys(v_smem, last, p.shape[1])
                    o = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v))(o_acc)
                    plgpu.barrier_arrive(v_free.at[slot_of(last)])
                    return o

                def one_short_tile():
                    """All of an item whose only live tile is short."""
                    m, l, p = first_tile(SHORT)
                    wait_for_v(last)
                    return last_product(o_start, p), m, l

                def other_tiles():
                    """All of any other item."""
                    m, l, p = first_tile(tiles.block_kv)
                    to = either(short, lambda: last, lambda: live_to)
                    carry = lax.fori_loop(live_from + 1, to, step, (o_start, m, l, p))
                    return either(short, short_end, end, *carry)

                def short_end(o, m, l, p):
                    o, m, l, p = step(last, (o, m, l, p), SHORT)
                    return last_product(o, p), m, l

                def end(o, m, l, p):
                    wait_for_v(last)
                    return last_product(o, p), m, l

                def epilogue(o, m, l):
                    l = l.sum(axis=1)
                    sees_any = l > 0.0
                    if not careful:
                        softmax.flag(again_own, (flag_of(i), AGAIN), l)
                    o = o * by_row(jnp.where(sees_any, 1.0 / l, 0.0), o.shape)
                    # Staged where Q was: nobody else reads this consumer's part of the slot.
                    q[...] = o.astype(dtype)
                    lse_smem[wg] = jnp.where(sees_any, m + jnp.log2(l), jnp.inf)
                    plgpu.commit_smem()
                    token = pl.multiple_of(row_tile * queries + wg * tiles.group, block_map.ALIGN)
                    for h in range(tiles.heads):
                        rows = pl.ds(h * tiles.group, tiles.group)
                        tokens, q_head = pl.ds(token, tiles.group), head * tiles.heads + h
                        plgpu.copy_smem_to_gmem(
                            q.at[rows], o_gmem.at[tokens, q_head], commit_group=False
                        )
                        plgpu.copy_smem_to_gmem(
                            lse_smem.at[wg, rows], lse_gmem.at[q_head, tokens], commit_group=False
                        )
                    plgpu.commit_smem_to_gmem_group()

                zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS,), jnp.float32), ROW)
                m_start = plgpu.layout_cast(
                    jnp.full((WARPGROUP_ROWS,), softmax.M_START, jnp.float32), ROW
                )
                l_start = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, PARTS), jnp.float32), TILE)
                o_start = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, H), jnp.float32), TILE)

                lax.fori_loop(0, live_from, skip, ())
                alone = short is not False and short & (live_from == last)
                o, m, l = either(alone, one_short_tile, other_tiles)
                lax.fori_loop(live_to, count, skip, ())
                # Normalise and store, while the next item's Q, K and V are on their way.
                epilogue(o, m, l)
                return count

            def between():
                # What the first pass stored must have arrived before the second overwrites it.
                plgpu.wait_smem_to_gmem(0)
                plgpu.barrier_arrive(again_full)

            each_item(body, lambda row: [], between)
            plgpu.wait_smem_to_gmem(0)

    run = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((R, N, H), dtype),
            jax.ShapeDtypeStruct((N, row_tiles * queries), jnp.float32),
        ),
        grid=(programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=scratch(H, dtype, tiles),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Every hand-over is by a barrier of the table above; the automatic ones would stop a
            # warpgroup at each store to shared memory.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        kernel_name="flash_forward",
    )
    optional = [x for x in (work.cols, work.row_ids, work.col_ids) if x is not None]
    return run(q_RNH, k_CKH, v_CKH, jnp.asarray(schedule), work.work, work.ends, *optional)


def either(condition, if_true, if_false, *operands):
    """`lax.cond` that leaves out the branch which is known, while tracing, not to be taken."""
    if condition is False:
        return if_false(*operands)
    return lax.cond(condition, if_true, if_false, *operands)
