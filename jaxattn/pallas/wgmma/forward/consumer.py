"""The forward kernel's consumers: scores, softmax and output, 64 rows each, tile by tile."""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxattn import block_map
from jaxattn.pallas import softmax
from jaxattn.pallas.launch import CONSUMER_REGISTERS
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.softmax import PARTS, ROW, TILE, by_row
from jaxattn.pallas.tiles import WARPGROUP_ROWS
from jaxattn.pallas.wgmma.forward.context import ITEM_SLOTS, SHORT, Job, either
from jaxattn.pallas.wgmma.forward.work_loop import each_item, flag_of


def consume(job: Job, wg) -> None:
    """All that the consumer warpgroup `wg` does."""
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    smem = job.smem
    for slot in range(ITEM_SLOTS):
        plgpu.barrier_arrive(smem.q_free.at[job.item_slot(jnp.int32(slot), wg)])
    for slot in range(job.tiles.stages):
        plgpu.barrier_arrive(smem.k_free.at[slot])
        plgpu.barrier_arrive(smem.v_free.at[slot])
    if job.two_passes:
        smem.again_smem[wg] = jnp.zeros((job.flags + 1,), jnp.int32)
        plgpu.commit_smem()

    def body(i, head, row, _, done, careful):
        return _Item(job, wg, i, row, done, careful).compute(head)

    def between():
        # What the first pass stored must have arrived before the second overwrites it.
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(smem.again_full)

    each_item(job, body, lambda row: [], between)
    plgpu.wait_smem_to_gmem(0)


class _Item:
    """A consumer's rows of one item, and the column tiles that they see: `live_from` to `last`.

    o, m, l, p in the methods: output so far, offset and sum of the exponentials, and those of the
    tile whose product with V is still to come.
    """

    def __init__(self, job: Job, wg, i, row, done, careful: bool):
        """Waits for the item.

        Args:
          job: the program's.
          wg: which consumer.
          i: items before it.
          row: its place in the work list.
          done: column tiles of the items before it.
          careful: whether the maximum of rows is followed.
        """
        self.job, self.wg, self.i, self.row, self.done = job, wg, i, row, done
        self.careful = careful
        smem = job.smem
        slot = lax.rem(i, jnp.int32(ITEM_SLOTS))
        self.q, self.ends = smem.q_smem.at[slot, wg], smem.ends_smem.at[slot, wg]
        plgpu.barrier_wait(smem.q_full.at[job.item_slot(i, wg)])
        fields = [smem.work_smem[slot, wg, field] for field in range(block_map.FULL_TO + 1)]
        self.row_tile, self.start, self.count, _, self.ids_decide = fields[:5]
        self.live_from, self.live_to, columns, self.full_from, self.full_to = fields[5:]
        self.last = self.live_to - 1
        self.short = job.ends_short(columns, self.last, careful)
        rows = WARPGROUP_ROWS
        self.zeros = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROW)
        self.m_start = plgpu.layout_cast(jnp.full((rows,), softmax.M_START, jnp.float32), ROW)
        self.l_start = plgpu.layout_cast(jnp.zeros((rows, PARTS), jnp.float32), TILE)
        self.o_start = plgpu.layout_cast(jnp.zeros((rows, job.head_dim), jnp.float32), TILE)

    def compute(self, head):
        """All of the item; returns how many column tiles it has, with those of others only."""
        lax.fori_loop(0, self.live_from, self._skip, ())
        alone = self.short is not False and self.short & (self.live_from == self.last)
        o, m, l = either(alone, self._one_short_tile, self._other_tiles)
        lax.fori_loop(self.live_to, self.count, self._skip, ())
        # Normalise and store, while the next item's Q, K and V are on their way.
        self._store(head, o, m, l)
        return self.count

    def _one_short_tile(self):
        """All of an item whose only live tile is short."""
        m, l, p = self._first_tile(SHORT)
        self._wait_for_v(self.last)
        return self._last_product(self.o_start, p), m, l

    def _other_tiles(self):
        """All of any other item."""
        m, l, p = self._first_tile(self.job.tiles.block_kv)
        to = either(self.short, lambda: self.last, lambda: self.live_to)
        carry = lax.fori_loop(self.live_from + 1, to, self._step, (self.o_start, m, l, p))
        return either(self.short, self._short_end, self._end, *carry)

    def _short_end(self, o, m, l, p):
        o, m, l, p = self._step(self.last, (o, m, l, p), SHORT)
        return self._last_product(o, p), m, l

    def _end(self, o, m, l, p):
        self._wait_for_v(self.last)
        return self._last_product(o, p), m, l

    def _skip(self, j, _):
        """A tile that only the other warpgroups need: free it unread."""
        smem, slot = self.job.smem, self._slot(j)
        plgpu.barrier_wait(smem.k_full.at[slot])
        plgpu.barrier_arrive(smem.k_free.at[slot])
        plgpu.barrier_wait(smem.v_full.at[slot])
        plgpu.barrier_arrive(smem.v_free.at[slot])
        return ()

    def _first_tile(self, size: int):
        """Scores and softmax of the first live tile: nothing to overlap with yet."""
        job, j = self.job, self.live_from

        def scores(s_acc):
            plgpu.wgmma(s_acc, self.q, self._keys(job.smem.k_smem, j, size).T)
            return s_acc[...]

        plgpu.barrier_wait(job.smem.k_full.at[self._slot(j)])
        s = pl.run_scoped(scores, plgpu.ACC((WARPGROUP_ROWS, size), jnp.float32))
        plgpu.barrier_arrive(job.smem.k_free.at[self._slot(j)])
        s = self._masked(s, j)
        p, l, m = softmax.online_softmax(s, self.m_start, self.l_start, job.scale)[:3]
        if size == job.tiles.block_kv:
            self._wait_for_k(j + 1)

        # The output of the item before, staged in its slot, has left by now.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(self.i > 0)
        def _():
            plgpu.barrier_arrive(job.smem.q_free.at[job.item_slot(self.i - 1, self.wg)])

        return m, l, self._rounded(p)

    def _step(self, j, carry, size: int | None = None):
        """S = Q K_j^T and O += P V_(j-1) run while the softmax of tile j-1 is done."""
        job = self.job
        whole = job.tiles.block_kv
        size = whole if size is None else size
        o, m, l, p = carry

        def overlapped(refs):
            o_acc, *state = refs

            def scores(s_acc):
                plgpu.wgmma(s_acc, self.q, self._keys(job.smem.k_smem, j, size).T)
                self._wait_for_v(j - 1)
                plgpu.wgmma(o_acc, p, self._keys(job.smem.v_smem, j - 1, whole))
                return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # P V still runs

            s = pl.run_scoped(scores, plgpu.ACC(s_shape, jnp.float32))
            plgpu.barrier_arrive(job.smem.k_free.at[self._slot(j)])
            new = self._softmax(self._masked(s, j), j, m, l)
            # ptxas moves the wait for P V up to before the softmax, which undoes the
            # overlap, unless a branch stands between: this wait is that branch. And P
            # stays fp32 until P V is done, or ptxas serialises the two (C7513).
            new = lax.optimization_barrier(new)
            self._wait_for_k(j + 1) if size == whole else self._wait_for_v(j)
            for ref, value in zip(state, new, strict=True):
                ref[...] = value

        s_shape = (WARPGROUP_ROWS, size)
        no_p = plgpu.layout_cast(jnp.zeros(s_shape, jnp.float32), TILE)
        alpha = [self.zeros] if self.careful else []
        state: Any = (plgpu.ACC.init(o), no_p, l, m, *alpha)
        o, p, l, m, *alpha = pl.run_state(overlapped)(state)
        plgpu.barrier_arrive(job.smem.v_free.at[self._slot(j - 1)])
        if self.careful:
            o = softmax.rescale(o, *alpha)
        return o, m, l, self._rounded(p)

    def _softmax(self, s, j, m, l):
        """(p, new l, new m), and where the maximum is followed, what to scale O by."""
        scale = self.job.scale
        if self.careful:
            return softmax.online_softmax(s, m, l, scale)
        # Rows begin where some row's range does, nowhere else.
        starts = functools.partial(softmax.first_offset, scale=scale)
        first = lax.cond(j < self.full_from, starts, lambda _, m: m, s, m)
        return *softmax.offset_softmax(s, first, l, scale), first

    def _last_product(self, o, p):
        o_acc: Any = plgpu.ACC.init(o)
        v = self._keys(self.job.smem.v_smem, self.last, p.shape[1])
        o = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v))(o_acc)
        plgpu.barrier_arrive(self.job.smem.v_free.at[self._slot(self.last)])
        return o

    def _store(self, head, o, m, l) -> None:
        """O / l and the log-sum-exp; flags the item where a sum is out of reach."""
        job, wg = self.job, self.wg
        lse_smem = job.smem.lse_smem
        l = l.sum(axis=1)
        sees_any = l > 0.0
        if not self.careful:
            softmax.flag(job.smem.again_smem.at[wg], (flag_of(job, self.i), job.flags), l)
        o = o * by_row(jnp.where(sees_any, 1.0 / l, 0.0), o.shape)
        # Staged where Q was: nobody else reads this consumer's part of the slot.
        self.q[...] = self._rounded(o)
        lse_smem[wg] = jnp.where(sees_any, m + jnp.log2(l), jnp.inf)
        plgpu.commit_smem()
        for tokens, q_head, rows in job.by_head(self.row_tile, head, wg):
            o_out, lse_out = job.gmem.o.at[tokens, q_head], job.gmem.lse.at[q_head, tokens]
            plgpu.copy_smem_to_gmem(self.q.at[rows], o_out, commit_group=False)
            plgpu.copy_smem_to_gmem(lse_smem.at[wg, rows], lse_out, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    def _masked(self, s, j):
        """Scores of the j-th tile, -inf where the mask hides them."""
        col = self.job.column(self.start, j)
        ids = None
        if self.job.gmem.ids is not None:
            row_ids, col_ids = self.job.gmem.ids
            of_tile = col_ids.at[pl.ds(col, s.shape[1])]
            ids = self.ids_decide, row_ids.at[self.row, self.wg], of_tile
        below, above = j < self.full_from, j >= self.full_to
        return softmax.mask_scores(s, col, self.ends, below=below, above=above, ids=ids)

    def _rounded(self, x):
        """In the inputs' dtype."""
        return x.astype(self.job.gmem.q.dtype)

    def _slot(self, j):
        """Stage of the j-th tile's K and V."""
        return ring_slot(self.done + j, self.job.tiles.stages)

    def _keys(self, smem, j, size: int):
        """The j-th tile's K or V, all of it or the short part."""
        return smem.at[self._slot(j), pl.ds(0, size)]

    def _wait_for_k(self, j) -> None:
        @pl.when(j < self.live_to)
        def _():
            plgpu.barrier_wait(self.job.smem.k_full.at[self._slot(j)])

    def _wait_for_v(self, j) -> None:
        plgpu.barrier_wait(self.job.smem.v_full.at[self._slot(j)])
