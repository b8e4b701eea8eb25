"""The backward kernel's consumers: the gradients of 64 keys each, and half of dQ's tile."""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxattn import block_map
from jaxattn.pallas import softmax, stmatrix
from jaxattn.pallas.launch import CONSUMER_REGISTERS
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.softmax import COL, LOG2E, by_col
from jaxattn.pallas.tiles import WARPGROUP_ROWS
from jaxattn.pallas.wgmma.backward.context import Job


def consume(job: Job, wg: int) -> None:
    """All that the consumer warpgroup `wg` does."""
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    _Keys(job, wg).compute()


class _Keys:
    """A consumer's keys: their K and V, dK and dV, and which of their scores are hidden."""

    def __init__(self, job: Job, wg: int):
        """Waits for them."""
        self.job, self.wg = job, wg
        self.dtype = job.gmem.q.dtype
        self.own = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
        self.k, self.v = job.smem.k_smem.at[self.own], job.smem.v_smem.at[self.own]
        self.ids_decide, self.full_from, self.full_to = (
            job.gmem.work[job.row, 0, i]
            for i in (block_map.BY_ID, block_map.FULL_FROM, block_map.FULL_TO)
        )
        self.full_tiles = jnp.maximum(self.full_to - self.full_from, 0).astype(jnp.uint32)
        plgpu.barrier_wait(job.barriers.kv_full)
        plgpu.barrier_wait(job.barriers.ends_full)

    def compute(self) -> None:
        """Walks over the queries, and stores dK and dV."""

        def accumulate(dk_acc, dv_acc):
            self.job.each_tile(functools.partial(self._step, dk_acc, dv_acc))
            return dk_acc[...], dv_acc[...]

        shape = (WARPGROUP_ROWS, self.job.head_dim)
        dk, dv = pl.run_scoped(accumulate, *[plgpu.ACC(shape, jnp.float32)] * 2)
        self._store(dk, dv)

    def _step(self, dk_acc, dv_acc, head, t, i):
        """Five products with the tile t of a head's queries, the i-th of the walk."""
        job, barriers = self.job, self.job.barriers
        slot = ring_slot(i, job.tiles.stages)
        q, do = job.smem.q_smem.at[slot], job.smem.do_smem.at[slot]
        with_dq = job.gmem.dq is not None
        ds: Any = job.smem.ds_smem.at[slot] if with_dq else None
        s_shape = (WARPGROUP_ROWS, job.tiles.block_q)

        def probabilities(s_acc, dp_acc):
            # 2. P^T = exp2(S^T - lse), while dP^T runs.
            s = self._masked(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), t)
            lse = plgpu.load(job.smem.lse_smem.at[slot], layout=COL)
            p = jnp.exp2(s * (job.scale * LOG2E) - by_col(lse, s_shape))
            p16 = p.astype(self.dtype)
            # 3. dS^T = P^T * (dP^T - delta), stored for dQ.
            delta = plgpu.load(job.smem.delta_smem.at[slot], layout=COL)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
            ds16 = (p * (dp - by_col(delta, s_shape))).astype(self.dtype)
            if with_dq:
                stmatrix.store_transposed(ds.at[:, self.own], ds16)
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
            # 6. Add dQ to memory while dK runs. The add before is long done.
            dq_own = job.smem.dq_smem.at[self.wg]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            dq_own[...] = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_own, self._dq_target(head, t), reduction_op="add")
            plgpu.wgmma_wait(0)  # dK is done
            plgpu.barrier_arrive(barriers.q_free[i])

        def key_gradients(ds16):
            # 5. dK += dS^T Q alone. The fence stands between this consumer's reads
            # of lse and delta and the copies that overwrite them.
            plgpu.wgmma(dk_acc, ds16, q)
            plgpu.commit_smem()
            plgpu.wgmma_wait(1)  # dV is done
            plgpu.barrier_arrive(barriers.do_free[i])
            plgpu.wgmma_wait(0)  # dK is done
            plgpu.barrier_arrive(barriers.q_free[i])

        # 1. S^T = K Q^T and dP^T = V dO^T. The waits for Q and dS stand outside the
        # accumulators' scopes, or ptxas fills them with zeros register by register.
        plgpu.barrier_wait(barriers.q_full[i])
        ds16 = pl.run_scoped(scores, plgpu.ACC(s_shape, jnp.float32))
        if not with_dq:
            key_gradients(ds16)
            return
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.ds_full)
        plgpu.barrier_wait(barriers.ds_full)
        with_ds = functools.partial(query_gradients, ds16=ds16)
        pl.run_scoped(with_ds, plgpu.ACC(job.dq_part, jnp.float32))

    def _masked(self, s, t):
        """Scores of the t-th tile, -inf where the mask hides them."""
        job = self.job
        query = job.column(t)
        ids = None
        if job.gmem.ids is not None:
            key_ids, query_ids = job.gmem.ids
            of_tile = query_ids.at[pl.ds(query, s.shape[1])]
            ids = self.ids_decide, key_ids.at[job.row, 0, self.own], of_tile

        def cut(s):
            ends = job.smem.ends_smem.at[:, self.own]
            below, above = t < self.full_from, t >= self.full_to
            return softmax.mask_scores(s, query, ends, below=below, above=above, ids=ids)

        # One branch around all that few tiles need, by one comparison, which saves the
        # registers that spilled: as an unsigned number t - full_from is large below 0.
        whole = (t - self.full_from).astype(jnp.uint32) < self.full_tiles
        return lax.cond(whole, lambda s: s, cut, s)

    def _dq_factors(self, ds):
        """Both factors of dQ = dS K: this consumer's columns of K, or its queries of dS."""
        rows, cols = self.job.dq_part
        if cols < self.job.head_dim:
            return ds, self.job.smem.k_smem.at[:, pl.ds(self.wg * cols, cols)]
        return ds.at[pl.ds(self.wg * rows, rows)], self.job.smem.k_smem

    def _dq_target(self, head, t):
        """Where this consumer's part of dQ is added."""
        rows, cols = self.job.dq_part
        dq: Any = self.job.gmem.dq
        token, col = self.job.first_query(t), head * self.job.head_dim
        if cols < self.job.head_dim:
            return dq.at[pl.ds(token, rows), pl.ds(col + self.wg * cols, cols)]
        return dq.at[pl.ds(token + self.wg * rows, rows), pl.ds(col, cols)]

    def _store(self, dk, dv) -> None:
        """Stages both through V's memory, one after the other.

        The other consumer may still read K for its dQ, but nobody reads this warpgroup's rows of V
        any more.
        """
        job = self.job
        key = job.key + self.wg * WARPGROUP_ROWS
        keys = pl.ds(key, WARPGROUP_ROWS), job.head_cols(job.kv_head)
        for gradient, target in ((dv, job.gmem.dv), (dk * job.scale, job.gmem.dk)):
            self.v[...] = gradient.astype(self.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(self.v, target.at[keys])
            # Read is enough, also for the last: the end of the kernel is what makes it visible.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
