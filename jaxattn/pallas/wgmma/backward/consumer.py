"""Consumers of the backward kernel: gradients of 64 keys each, and half of dQ's tile."""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxattn.block_map import WorkField
from jaxattn.pallas import softmax, stmatrix
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.softmax import COL, LOG2E, by_col
from jaxattn.pallas.tiles import WARPGROUP_ROWS
from jaxattn.pallas.wgmma.backward.context import KernelContext
from jaxattn.pallas.wgmma.tiles import CONSUMER_REGISTERS


def consume(ctx: KernelContext, wg: int) -> None:
    """Run the consumer warpgroup `wg`."""
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    _Keys(ctx, wg).compute()


class _Keys:
    """Keys of one consumer: K, V, dK, dV and the mask of their scores."""

    def __init__(self, ctx: KernelContext, wg: int):
        """Wait for K, V and the row bounds in shared memory."""
        self.ctx, self.wg = ctx, wg
        self.dtype = ctx.gmem.q.dtype
        self.rows = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        self.k, self.v = ctx.smem.k_smem.at[self.rows], ctx.smem.v_smem.at[self.rows]
        self.by_id, self.full_from, self.full_to = (
            ctx.gmem.work[ctx.row, 0, field]
            for field in (WorkField.BY_ID, WorkField.FULL_FROM, WorkField.FULL_TO)
        )
        self.full_tiles = jnp.maximum(self.full_to - self.full_from, 0).astype(jnp.uint32)
        plgpu.barrier_wait(ctx.barriers.kv_full)
        plgpu.barrier_wait(ctx.barriers.bounds_full)

    def compute(self) -> None:
        """Loop over the Q tiles, then store dK and dV."""

        def accumulate(dk_acc, dv_acc):
            self.ctx.work_loop(functools.partial(self._step, dk_acc, dv_acc))
            return dk_acc[...], dv_acc[...]

        shape = (WARPGROUP_ROWS, self.ctx.head_dim)
        dk, dv = pl.run_scoped(accumulate, *[plgpu.ACC(shape, jnp.float32)] * 2)
        self._store(dk, dv)

    def _step(self, dk_acc, dv_acc, head, t, i):
        """Compute the five products of the head's Q tile t, the i-th tile of the loop."""
        ctx, barriers = self.ctx, self.ctx.barriers
        slot = ring_slot(i, ctx.tiles.stages)
        q, do = ctx.smem.q_smem.at[slot], ctx.smem.do_smem.at[slot]
        with_dq = ctx.gmem.dq is not None
        ds: Any = ctx.smem.ds_smem.at[slot] if with_dq else None
        s_shape = (WARPGROUP_ROWS, ctx.tiles.block_q)

        def probabilities(s_acc, dp_acc):
            # 2. P^T = exp2(S^T - lse), while dP^T runs.
            s = self._masked(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), t)
            lse = plgpu.load(ctx.smem.lse_smem.at[slot], layout=COL)
            p = jnp.exp2(s * (ctx.scale * LOG2E) - by_col(lse, s_shape))
            p16 = p.astype(self.dtype)
            # 3. dS^T = P^T * (dP^T - delta), stored for dQ.
            delta = plgpu.load(ctx.smem.delta_smem.at[slot], layout=COL)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
            ds16 = (p * (dp - by_col(delta, s_shape))).astype(self.dtype)
            if with_dq:
                stmatrix.store_transposed(ds.at[:, self.rows], ds16)
            # 4. dV += P^T dO.
            plgpu.wgmma(dv_acc, p16, do)
            return ds16

        def score_gradients(dp_acc, s_acc):
            plgpu.wgmma(dp_acc, self.v, do.T)
            return probabilities(s_acc, dp_acc)

        def scores(s_acc):
            plgpu.wgmma(s_acc, self.k, q.T)
            plgpu.barrier_wait(barriers.do_full[i])
            with_s = functools.partial(score_gradients, s_acc=s_acc)
            return pl.run_scoped(with_s, plgpu.ACC(s_shape, jnp.float32))

        def query_gradients(dq_acc, ds16):
            # 5. dQ = dS K and dK += dS^T Q.
            plgpu.wgmma(dq_acc, *self._dq_factors(ds))
            plgpu.wgmma(dk_acc, ds16, q)
            plgpu.wgmma_wait(2)  # dV is done
            plgpu.barrier_arrive(barriers.do_free[i])
            # 6. Add dQ to memory while dK runs. The add of the tile before is long done.
            dq_smem = ctx.smem.dq_smem.at[self.wg]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_smem[...] = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_smem, self._dq_target(head, t), reduction_op="add")
            plgpu.wgmma_wait(0)  # dK is done
            plgpu.barrier_arrive(barriers.q_free[i])

        def key_gradients(ds16):
            # 5. dK += dS^T Q alone. The fence orders this consumer's reads of lse and
            # delta before the copies that overwrite them.
            plgpu.wgmma(dk_acc, ds16, q)
            plgpu.commit_smem()
            plgpu.wgmma_wait(1)  # dV is done
            plgpu.barrier_arrive(barriers.do_free[i])
            plgpu.wgmma_wait(0)  # dK is done
            plgpu.barrier_arrive(barriers.q_free[i])

        # 1. S^T = K Q^T and dP^T = V dO^T. The waits for Q and dS are outside the scopes of
        # the accumulators, or ptxas fills the accumulators with zeros register by register.
        plgpu.barrier_wait(barriers.q_full[i])
        ds16 = pl.run_scoped(scores, plgpu.ACC(s_shape, jnp.float32))
        if not with_dq:
            key_gradients(ds16)
            return
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.ds_full)
        plgpu.barrier_wait(barriers.ds_full)
        with_ds = functools.partial(query_gradients, ds16=ds16)
        pl.run_scoped(with_ds, plgpu.ACC(ctx.dq_part, jnp.float32))

    def _masked(self, s, t):
        """Return the scores of the t-th Q tile, -inf where the mask hides them."""
        ctx = self.ctx
        query = ctx.q_column(t)
        ids = None
        if ctx.gmem.row_ids is not None:
            tile_ids = ctx.gmem.col_ids.at[pl.ds(query, s.shape[1])]
            ids = self.by_id, ctx.gmem.row_ids.at[ctx.row, 0, self.rows], tile_ids

        def mask(s):
            bounds = ctx.smem.bounds_smem.at[:, self.rows]
            below, above = t < self.full_from, t >= self.full_to
            return softmax.mask_scores(s, query, bounds, below=below, above=above, ids=ids)

        # One branch with one comparison around the masking, which few tiles need: this saves the
        # registers that spilled. As an unsigned number t - full_from is large below 0.
        whole = (t - self.full_from).astype(jnp.uint32) < self.full_tiles
        return lax.cond(whole, lambda s: s, mask, s)

    def _dq_factors(self, ds):
        """Return both factors of dQ = dS K: this consumer's columns of K, or its queries of dS."""
        rows, cols = self.ctx.dq_part
        if cols < self.ctx.head_dim:
            return ds, self.ctx.smem.k_smem.at[:, pl.ds(self.wg * cols, cols)]
        return ds.at[pl.ds(self.wg * rows, rows)], self.ctx.smem.k_smem

    def _dq_target(self, head, t):
        """Return the ref that this consumer's part of dQ is added to."""
        rows, cols = self.ctx.dq_part
        dq: Any = self.ctx.gmem.dq
        token, col = self.ctx.aligned_q_column(t), head * self.ctx.head_dim
        if cols < self.ctx.head_dim:
            return dq.at[pl.ds(token, rows), pl.ds(col + self.wg * cols, cols)]
        return dq.at[pl.ds(token + self.wg * rows, rows), pl.ds(col, cols)]

    def _store(self, dk, dv) -> None:
        """Store dV and dK, staged in place of V one after the other.

        The other consumer may still read K for its dQ, but no warpgroup reads this consumer's rows
        of V any more.
        """
        ctx = self.ctx
        key = ctx.key + self.wg * WARPGROUP_ROWS
        keys = pl.ds(key, WARPGROUP_ROWS), ctx.head_slice(ctx.kv_head)
        for gradient, target in ((dv, ctx.gmem.dv), (dk * ctx.scale, ctx.gmem.dk)):
            self.v[...] = gradient.astype(self.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.v, target.at[keys])
            # Waiting for the read is enough, also for the last copy: the kernel's end makes it
            # visible.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
