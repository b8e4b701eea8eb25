"""Consumers of the forward kernel: scores, softmax and output of 64 rows each, tile by tile."""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxattn.block_map import WorkField
from jaxattn.pallas import softmax
from jaxattn.pallas.softmax import PARTS, ROW, TILE, by_row
from jaxattn.pallas.tiles import WARPGROUP_ROWS
from jaxattn.pallas.wgmma.forward.context import (
    SHORT_KV,
    WORK_SLOTS,
    KernelContext,
    static_cond,
)
from jaxattn.pallas.wgmma.forward.work_loop import retry_flag, work_loop
from jaxattn.pallas.wgmma.forward.work_tile import WorkTile
from jaxattn.pallas.wgmma.tiles import CONSUMER_REGISTERS


def consume(ctx: KernelContext, wg) -> None:
    """Run the consumer warpgroup `wg`."""
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    smem = ctx.smem
    for slot in range(WORK_SLOTS):
        plgpu.barrier_arrive(smem.q_free.at[ctx.q_barrier(jnp.int32(slot), wg)])
    for slot in range(ctx.tiles.stages):
        plgpu.barrier_arrive(smem.k_free.at[slot])
        plgpu.barrier_arrive(smem.v_free.at[slot])
    if ctx.two_passes:
        smem.retry_flags[wg] = jnp.zeros((ctx.num_retry_flags + 1,), jnp.int32)
        plgpu.commit_smem()

    def mainloop(i, tile_head, row, _, kv_tiles_before, online):
        return _ForwardTile(ctx, wg, i, row, kv_tiles_before, online).compute(tile_head)

    def between_passes():
        # The stores of the first pass must be complete before the second pass overwrites them.
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(smem.retry_full)

    work_loop(ctx, mainloop, lambda row: [], between_passes)
    plgpu.wait_smem_to_gmem(0)


class _ForwardTile(WorkTile):
    """One consumer's part of a work tile in the forward kernel.

    o, m, l, p in the methods: output so far, softmax offset, sum of the exponentials, and the
    exponentials of the KV tile whose product with V is still to come.
    """

    def __init__(self, ctx: KernelContext, wg, i, row, kv_tiles_before, online: bool):
        """Wait for the work tile, the program's i-th, in shared memory.

        With `online` the softmax keeps a running maximum. Other arguments as for `WorkTile`.
        """
        self.i, self.online = i, online
        smem = ctx.smem
        slot = lax.rem(i, jnp.int32(WORK_SLOTS))
        q, row_bounds = smem.q_smem.at[slot, wg], smem.bounds_smem.at[slot, wg]
        plgpu.barrier_wait(smem.q_full.at[ctx.q_barrier(i, wg)])
        super().__init__(
            ctx,
            wg,
            row=row,
            fields=[smem.work_smem[slot, wg, field] for field in WorkField],
            q=q,
            row_bounds=row_bounds,
            kv_tiles_before=kv_tiles_before,
        )
        self.last = self.live_to - 1
        self.short = ctx.is_short(self.live_columns, self.last, online)
        rows = WARPGROUP_ROWS
        self.zeros = plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROW)
        self.m_start = plgpu.layout_cast(jnp.full((rows,), softmax.M_START, jnp.float32), ROW)
        self.l_start = plgpu.layout_cast(jnp.zeros((rows, PARTS), jnp.float32), TILE)
        self.o_start = plgpu.layout_cast(jnp.zeros((rows, ctx.head_dim), jnp.float32), TILE)

    def compute(self, tile_head):
        """Process the work tile. Return its KV-tile count, with tiles of the other consumer."""
        lax.fori_loop(0, self.live_from, self.skip, ())
        one_short_tile = self.short is not False and self.short & (self.live_from == self.last)
        o, m, l = static_cond(one_short_tile, self._one_short_tile, self._all_tiles)
        lax.fori_loop(self.live_to, self.count, self.skip, ())
        # Normalize and store, while the Q, K and V of the next work tile are being copied.
        self._store(tile_head, o, m, l)
        return self.count

    def _one_short_tile(self):
        """Compute (o, m, l) where the only live KV tile is short."""
        m, l, p = self._first_tile(SHORT_KV)
        self.wait_for_v(self.last)
        return self._last_product(self.o_start, p), m, l

    def _all_tiles(self):
        """Compute (o, m, l) in all other cases."""
        m, l, p = self._first_tile(self.ctx.tiles.block_kv)
        end = static_cond(self.short, lambda: self.last, lambda: self.live_to)
        carry = lax.fori_loop(self.live_from + 1, end, self._step, (self.o_start, m, l, p))
        return static_cond(self.short, self._short_epilogue, self._epilogue, *carry)

    def _short_epilogue(self, o, m, l, p):
        o, m, l, p = self._step(self.last, (o, m, l, p), SHORT_KV)
        return self._last_product(o, p), m, l

    def _epilogue(self, o, m, l, p):
        self.wait_for_v(self.last)
        return self._last_product(o, p), m, l

    def _first_tile(self, size: int):
        """Compute scores and softmax of the first live KV tile, which overlap with nothing."""
        ctx, j = self.ctx, self.live_from

        def scores(s_acc):
            plgpu.wgmma(s_acc, self.q, self._keys(ctx.smem.k_smem, j, size).T)
            return s_acc[...]

        plgpu.barrier_wait(ctx.smem.k_full.at[self.slot(j)])
        s = pl.run_scoped(scores, plgpu.ACC((WARPGROUP_ROWS, size), jnp.float32))
        plgpu.barrier_arrive(ctx.smem.k_free.at[self.slot(j)])
        s = self.masked(s, j)
        p, l, m = softmax.online_softmax(s, self.m_start, self.l_start, ctx.scale)[:3]
        if size == ctx.tiles.block_kv:
            self.wait_for_k(j + 1)

        # The output of the work tile before, staged in its slot, has been read by now.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(self.i > 0)
        def _():
            plgpu.barrier_arrive(ctx.smem.q_free.at[ctx.q_barrier(self.i - 1, self.wg)])

        return m, l, self.rounded(p)

    def _step(self, j, carry, short_size: int | None = None):
        """Overlap S = Q K_j^T and O += P V_(j-1) with the softmax of tile j - 1."""
        ctx = self.ctx
        whole = ctx.tiles.block_kv
        size = short_size or whole
        o, m, l, p = carry

        def overlapped(refs):
            o_acc, *state = refs

            def scores(s_acc):
                plgpu.wgmma(s_acc, self.q, self._keys(ctx.smem.k_smem, j, size).T)
                self.wait_for_v(j - 1)
                plgpu.wgmma(o_acc, p, self._keys(ctx.smem.v_smem, j - 1, whole))
                return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)  # P V still runs

            s = pl.run_scoped(scores, plgpu.ACC(s_shape, jnp.float32))
            plgpu.barrier_arrive(ctx.smem.k_free.at[self.slot(j)])
            new = self._softmax(self.masked(s, j), j, m, l)
            # ptxas moves the wait for P V up to before the softmax, which undoes the
            # overlap, unless a branch stands between: this wait is that branch. And P
            # stays fp32 until P V is done, or ptxas serializes the two (C7513).
            new = lax.optimization_barrier(new)
            self.wait_for_k(j + 1) if size == whole else self.wait_for_v(j)
            for ref, value in zip(state, new, strict=True):
                ref[...] = value

        s_shape = (WARPGROUP_ROWS, size)
        no_p = plgpu.layout_cast(jnp.zeros(s_shape, jnp.float32), TILE)
        alpha = [self.zeros] if self.online else []
        state: Any = (plgpu.ACC.init(o), no_p, l, m, *alpha)
        o, p, l, m, *alpha = pl.run_state(overlapped)(state)
        plgpu.barrier_arrive(ctx.smem.v_free.at[self.slot(j - 1)])
        if self.online:
            o = softmax.rescale(o, *alpha)
        return o, m, l, self.rounded(p)

    def _softmax(self, s, j, m, l):
        """Return (p, new l, new m), and with a running maximum the factor on O."""
        scale = self.ctx.scale
        if self.online:
            return softmax.online_softmax(s, m, l, scale)
        # Rows see their first key below FULL_FROM, nowhere else.
        starts = functools.partial(softmax.first_offset, scale=scale)
        first = lax.cond(j < self.full_from, starts, lambda _, m: m, s, m)
        return *softmax.offset_softmax(s, first, l, scale), first

    def _last_product(self, o, p):
        """Return O + P V of the last live KV tile."""
        o_acc: Any = plgpu.ACC.init(o)
        v = self._keys(self.ctx.smem.v_smem, self.last, p.shape[1])
        o = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v))(o_acc)
        plgpu.barrier_arrive(self.ctx.smem.v_free.at[self.slot(self.last)])
        return o

    def _store(self, tile_head, o, m, l) -> None:
        """Store O / l and the log-sum-exp; flag the work tile if a row's sum overflowed."""
        ctx, wg = self.ctx, self.wg
        lse_smem = ctx.smem.lse_smem
        l = l.sum(axis=1)
        sees_any = l > 0.0
        if not self.online:
            flags = retry_flag(ctx, self.i), ctx.num_retry_flags
            softmax.set_flags(ctx.smem.retry_flags.at[wg], flags, l)
        o = o * by_row(jnp.where(sees_any, 1.0 / l, 0.0), o.shape)
        # Staged in place of Q: no other warpgroup reads this consumer's part of the slot.
        self.q[...] = self.rounded(o)
        lse_smem[wg] = jnp.where(sees_any, m + jnp.log2(l), jnp.inf)
        plgpu.commit_smem()
        for queries, q_head, rows in ctx.qhead_blocks(self.row_tile, tile_head, wg):
            o_out, lse_out = ctx.gmem.o.at[queries, q_head], ctx.gmem.lse.at[q_head, queries]
            plgpu.copy_smem_to_gmem(self.q.at[rows], o_out, commit_group=False)
            plgpu.copy_smem_to_gmem(lse_smem.at[wg, rows], lse_out, commit_group=False)
        plgpu.commit_smem_to_gmem_group()

    def _keys(self, smem, j, size: int):
        """Return the ref to the first `size` keys of the j-th K or V tile."""
        return smem.at[self.slot(j), pl.ds(0, size)]
