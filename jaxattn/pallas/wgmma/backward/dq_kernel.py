"""dq kernel of the deterministic backward: a program owns queries and sums their gradient alone.

R rows = B * T concatenated queries, C columns = B * S keys, N query heads, K kv heads, H head dim.
A program owns a row tile as in the forward kernel, `CONSUMERS * warpgroup_queries` queries x
`qheads_per_tile` query heads of one kv head, and loops over the live KV tiles: S = Q K^T,
dP = dO V^T and dQ += dS K, three products a tile. Scores are not transposed here, so dS goes from
registers into its product, and dQ stays in registers until it is stored, once, in the inputs'
dtype.

| barrier   | arrives                         | waits         | asserts                           |
| --------- | ------------------------------- | ------------- | --------------------------------- |
| rows_full | copies of Q and dO by heads,    | all consumers | all data of the rows is loaded    |
|           | row bounds, lse and delta       |               |                                   |
| k_full    | copy of K                       | all consumers | the stage holds K                 |
| k_free    | every consumer after its dS K   | producer      | the stage of K may be overwritten |
| v_full    | copy of V                       | all consumers | the stage holds V                 |
| v_free    | every consumer after its dO V^T | producer      | the stage of V may be overwritten |
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxattn.block_map import ALIGN, BlockMap, WorkField
from jaxattn.pallas.launch import launch
from jaxattn.pallas.operands import BackwardOperands
from jaxattn.pallas.smem import ring_slot, swizzled
from jaxattn.pallas.softmax import LOG2E, ROW, by_row
from jaxattn.pallas.tiles import WARPGROUP_ROWS
from jaxattn.pallas.wgmma.forward.context import QueryContext
from jaxattn.pallas.wgmma.forward.work_tile import WorkTile
from jaxattn.pallas.wgmma.tiles import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER,
    PRODUCER_REGISTERS,
    ForwardTiles,
)

# Statistics of each row, in the order of `stats_smem`.
LSE, DELTA = range(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelContext(QueryContext):
    """Context of one program of the dq kernel.

    Attributes:
      row: index of the program's row tile in the work list.
      tile_head: group of `qheads_per_tile` query heads of the program.
      row_tile: ROW_TILE of the work list.
      start: START of the work list.
      count: COUNT of the work list.
    """

    row: jax.Array
    tile_head: jax.Array
    row_tile: jax.Array
    start: jax.Array
    count: jax.Array


def scratch(head_dim: int, dtype: jnp.dtype, tiles: ForwardTiles) -> dict:
    """Return the shared memory and barriers of one program."""
    rows = plgpu.SMEM((CONSUMERS, WARPGROUP_ROWS, head_dim), dtype, transforms=swizzled(dtype))
    kv = (tiles.stages, tiles.block_kv, head_dim)
    full = plgpu.Barrier(num_barriers=tiles.stages)
    free = plgpu.Barrier(num_barriers=tiles.stages, num_arrivals=CONSUMERS)
    return {
        "do_smem": rows,
        "bounds_smem": plgpu.SMEM((CONSUMERS, 2, WARPGROUP_ROWS), jnp.int32),
        "k_free": free,
        "k_full": full,
        "k_smem": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
        "rows_full": plgpu.Barrier(num_arrivals=2 * CONSUMERS * tiles.qheads_per_tile + 2),
        "q_smem": rows,
        "stats_smem": plgpu.SMEM((CONSUMERS, 2, WARPGROUP_ROWS), jnp.float32),
        "v_free": free,
        "v_full": full,
        "v_smem": plgpu.SMEM(kv, dtype, transforms=swizzled(dtype)),
    }


def query_gradient(
    x: BackwardOperands, work: BlockMap, *, scale: float, tiles: ForwardTiles
) -> Float[Array, "R N H"]:
    """Run the dq kernel, see `jaxattn.pallas.op.Family`."""
    R, N, H = x.q_RNH.shape
    K = x.k_CKH.shape[1]
    dtype = x.q_RNH.dtype
    row_tiles = -(-R // tiles.queries)

    def kernel(gmem, smem):
        wg, program = lax.axis_index("wg"), lax.axis_index("program")
        # Longest row tile first within a head; heads one after another, so that the K and V of a
        # head stay in the L2 cache while all its row tiles pass over them.
        row, tile_head = lax.rem(program, row_tiles), lax.div(program, row_tiles)
        row_tile, start, count = (
            gmem.work[row, 0, field]
            for field in (WorkField.ROW_TILE, WorkField.START, WorkField.COUNT)
        )
        ctx = KernelContext(
            tiles=tiles,
            scale=scale,
            head_dim=H,
            qheads_per_kvhead=N // K,
            row_tiles=row_tiles,
            gmem=gmem,
            smem=smem,
            row=row,
            tile_head=tile_head,
            row_tile=row_tile,
            start=start,
            count=count,
        )
        pl.when(wg == PRODUCER)(lambda: _produce(ctx))
        pl.when(wg < CONSUMERS)(lambda: _consume(ctx, wg))

    stats = _stats_by_tile((x.lse_NR, x.delta_NR), row_tiles, tiles)
    arrays = {"q": x.q_RNH, "k": x.k_CKH, "v": x.v_CKH, "do": x.do_RNH, "stats": stats}
    [dq_RNH] = launch(
        kernel,
        name="flash_backward_dq",
        programs=row_tiles * (N // tiles.qheads_per_tile),
        warpgroups=CONSUMERS + 1,
        inputs=arrays | work.inputs,
        out={"dq": jax.ShapeDtypeStruct((R, N, H), dtype)},
        scratch=scratch(H, dtype, tiles),
        semantics=plgpu.LoweringSemantics.Warpgroup,
    )
    return dq_RNH


def _produce(ctx: KernelContext) -> None:
    """Run the producer warpgroup: copy the data of the rows, then K and V tile by tile."""
    plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
    gmem, smem, tiles = ctx.gmem, ctx.smem, ctx.tiles
    plgpu.copy_gmem_to_smem(gmem.row_bounds.at[ctx.row], smem.bounds_smem, smem.rows_full)
    stats = gmem.stats.at[ctx.row_tile, ctx.tile_head]
    plgpu.copy_gmem_to_smem(stats, smem.stats_smem, smem.rows_full)
    for source, target in ((gmem.q, smem.q_smem), (gmem.do, smem.do_smem)):
        for consumer in range(CONSUMERS):
            blocks = ctx.qhead_blocks(ctx.row_tile, ctx.tile_head, consumer)
            for queries, q_head, rows in blocks:
                block = target.at[consumer, rows]
                plgpu.copy_gmem_to_smem(source.at[queries, q_head], block, smem.rows_full)

    @pl.loop(0, ctx.count)
    def _(j):
        slot = ring_slot(j, tiles.stages)
        col = pl.multiple_of(ctx.kv_column(ctx.start, j), ALIGN)
        keys = pl.ds(col, tiles.block_kv), ctx.kv_head(ctx.tile_head)

        def copy(source, target, free, full):
            # The stages are free in the first round.
            pl.when(j >= tiles.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[keys], target.at[slot], full.at[slot])

        copy(gmem.k, smem.k_smem, smem.k_free, smem.k_full)
        copy(gmem.v, smem.v_smem, smem.v_free, smem.v_full)


def _consume(ctx: KernelContext, wg) -> None:
    """Run the consumer warpgroup `wg`."""
    plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
    _DqTile(ctx, wg).compute()


class _DqTile(WorkTile):
    """One consumer's part of a row tile in the dq kernel."""

    def __init__(self, ctx: KernelContext, wg):
        """Wait for the data of the rows in shared memory."""
        fields = [ctx.row_tile, ctx.start, ctx.count, None]
        fields += [ctx.gmem.work[ctx.row, wg, field] for field in WorkField if field > 3]
        smem = ctx.smem
        super().__init__(
            ctx,
            wg,
            row=ctx.row,
            fields=fields,
            q=smem.q_smem.at[wg],
            row_bounds=smem.bounds_smem.at[wg],
            kv_tiles_before=0,
        )
        self.do, self.stats = smem.do_smem.at[wg], smem.stats_smem.at[wg]
        self.s_shape = (WARPGROUP_ROWS, ctx.tiles.block_kv)
        plgpu.barrier_wait(smem.rows_full)

    def compute(self) -> None:
        """Loop over the KV tiles, then store dQ."""
        lax.fori_loop(0, self.live_from, self.skip, ())
        shape = (WARPGROUP_ROWS, self.ctx.head_dim)
        dq = pl.run_scoped(self._accumulate, plgpu.ACC(shape, jnp.float32))
        lax.fori_loop(self.live_to, self.count, self.skip, ())
        # Staged in place of Q: no other warpgroup reads this consumer's part.
        self.q[...] = self.rounded(dq * self.ctx.scale)
        plgpu.commit_smem()
        for queries, q_head, rows in self.ctx.qhead_blocks(
            self.row_tile, self.ctx.tile_head, self.wg
        ):
            dq_out = self.ctx.gmem.dq.at[queries, q_head]
            plgpu.copy_smem_to_gmem(self.q.at[rows], dq_out, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    def _accumulate(self, dq_acc):
        """Return dQ, before the factor `scale`."""
        self.wait_for_k(self.live_from)

        def step(j, _):
            self._step(dq_acc, j)
            return ()

        lax.fori_loop(self.live_from, self.live_to, step, ())
        return dq_acc[...]

    def _step(self, dq_acc, j) -> None:
        """Add the dS K of the j-th KV tile."""
        smem, slot = self.ctx.smem, self.slot(j)
        k, v = smem.k_smem.at[slot], smem.v_smem.at[slot]

        def score_gradients(s_acc, dp_acc):
            plgpu.wgmma(s_acc, self.q, k.T)
            plgpu.wgmma(dp_acc, self.do, v.T)
            # 2. P = exp2(S - lse), while dP runs; dS = P * (dP - delta).
            s = self.masked(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), j)
            p = jnp.exp2(s * (self.ctx.scale * LOG2E) - self._by_row(LSE))
            # The wait for the next K is the branch without which ptxas moves the wait for dP up
            # to before the exponentials.
            p = lax.optimization_barrier(p)
            self.wait_for_k(j + 1)
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
            return self.rounded(p * (dp - self._by_row(DELTA)))

        # 1. S = Q K^T and dP = dO V^T. The waits are outside the scopes of the accumulators, or
        # ptxas fills the accumulators with zeros register by register.
        self.wait_for_v(j)
        ds16 = pl.run_scoped(score_gradients, *[plgpu.ACC(self.s_shape, jnp.float32)] * 2)
        plgpu.barrier_arrive(smem.v_free.at[slot])
        # 3. dQ += dS K.
        plgpu.wgmma(dq_acc, ds16, k)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(smem.k_free.at[slot])

    def _by_row(self, stat: int):
        """Load a statistic of each row, broadcast to a score tile."""
        return by_row(plgpu.load(self.stats.at[stat], layout=ROW), self.s_shape)


def _stats_by_tile(
    stats: tuple[Float[Array, "N rows"], ...], row_tiles: int, tiles: ForwardTiles
) -> Float[Array, "tiles tile_heads consumers stats tile_rows"]:
    """Reorder the statistics by tile, so that one copy fetches all of a program."""
    num_heads, rows = stats[0].shape
    queries, qheads = tiles.warpgroup_queries, tiles.qheads_per_tile
    tiled_rows = row_tiles * tiles.queries
    x = jnp.pad(jnp.stack(stats), ((0, 0), (0, 0), (0, max(tiled_rows - rows, 0))))
    x = x[..., :tiled_rows]
    x = x.reshape(len(stats), num_heads // qheads, qheads, row_tiles, CONSUMERS, queries)
    x = x.transpose(3, 1, 4, 0, 2, 5)
    return x.reshape(row_tiles, num_heads // qheads, CONSUMERS, len(stats), WARPGROUP_ROWS)
