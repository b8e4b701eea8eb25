"""Context of a forward program: sizes that are known while tracing, and refs to memory."""

import dataclasses
import types

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from jaxattn import block_map
from jaxattn.pallas.wgmma.tiles import CONSUMERS, ForwardTiles

# Slots for the Q, the work-list entry and the row bounds of a work tile. With two, the producer
# fetches a work tile while the consumers still compute the one before.
WORK_SLOTS = 2
# Keys in a short KV tile: the fewest that P V takes at a time from this layout of V.
SHORT_KV = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryContext:
    """Context of a program that owns queries and loops over KV tiles: forward and dq kernels.

    Attributes:
      tiles: the tile sizes.
      scale: factor on the scores.
      head_dim: H.
      qheads_per_kvhead: query heads of a kv head, N / K.
      row_tiles: row tiles of one head.
      gmem: refs to global memory, by the names of the kernel's inputs and outputs.
      smem: refs to shared memory and barriers, by the names of the kernel's `scratch`.
    """

    tiles: ForwardTiles
    scale: float
    head_dim: int
    qheads_per_kvhead: int
    row_tiles: int
    gmem: types.SimpleNamespace
    smem: types.SimpleNamespace

    def kv_head(self, tile_head):
        """Return the kv head of a group of query heads that share a tile."""
        return lax.div(tile_head * self.tiles.qheads_per_tile, self.qheads_per_kvhead)

    def kv_column(self, start, j):
        """Return the first key of the j-th KV tile; `start` is a work tile's START."""
        if self.gmem.cols is None:
            return start + j * self.tiles.block_kv
        return self.gmem.cols[start + j]

    def qhead_blocks(self, row_tile, tile_head, consumer):
        """Yield (query slice, query head, row slice in the tile) for each query head of the tile.

        The rows of a warpgroup are head-major.
        """
        queries = self.tiles.warpgroup_queries
        token = row_tile * self.tiles.queries + consumer * queries
        token = pl.multiple_of(token, block_map.ALIGN)
        for h in range(self.tiles.qheads_per_tile):
            q_head = tile_head * self.tiles.qheads_per_tile + h
            yield pl.ds(token, queries), q_head, pl.ds(h * queries, queries)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelContext(QueryContext):
    """Context of one program of the forward kernel.

    Attributes:
      two_passes: True if the first pass keeps its softmax offsets, and a second pass with a running
        maximum recomputes the work tiles that overflowed.
      program: index in the persistent grid.
      num_work_tiles: work tiles of this program. A work tile is tile_head * row_tiles + row, where
        `row` is the row tile's index in the work list, and `tile_head` counts groups of
        `qheads_per_tile` query heads.
    """

    two_passes: bool
    program: jax.Array
    num_work_tiles: jax.Array

    @property
    def num_retry_flags(self) -> int:
        """Number of per-tile retry flags. The element at this index is set if any flag is."""
        return self.smem.retry_flags.shape[1] - 1

    def is_short(self, columns, j, online: bool):
        """Return True if the j-th KV tile, the last of `columns` keys, is a short one.

        The second pass has no short tiles: it runs too rarely for more code.
        """
        if self.tiles.block_kv == SHORT_KV or online and self.two_passes:
            return False
        return columns - j * self.tiles.block_kv <= SHORT_KV

    def q_barrier(self, i, consumer):
        """Return the index of the q barriers of a consumer's part of the i-th work tile."""
        return lax.rem(i, jnp.int32(WORK_SLOTS)) * CONSUMERS + consumer


def static_cond(condition, if_true, if_false, *operands):
    """Do `lax.cond`, without the true branch if the condition is False while tracing."""
    if condition is False:
        return if_false(*operands)
    return lax.cond(condition, if_true, if_false, *operands)
