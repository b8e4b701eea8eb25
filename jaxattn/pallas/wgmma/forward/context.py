"""What a program of the forward kernel works with: sizes that are known while tracing, and refs."""

import dataclasses
import types
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from jaxattn import block_map
from jaxattn.pallas.tiles import CONSUMERS, ForwardTiles

# Slots for what belongs to an item: its Q, its row of the work list, its rows' visible ranges. With
# two, the producer fetches an item while the one before is still worked on.
ITEM_SLOTS = 2
# Keys of a short tile: the fewest that P V takes at a time from this layout of V.
SHORT = 64


class Gmem(NamedTuple):
    """Refs to global memory.

    Attributes:
      q: [R, N, H].
      k: [C, K, H].
      v: [C, K, H].
      schedule: `schedule.persistent_schedule`.
      work: `BlockMap.work`.
      ends: `BlockMap.ends`.
      cols: the columns to visit, if there is a pattern.
      ids: those of rows and of columns, if there are documents.
      o: [R, N, H].
      lse: [N, rows].
    """

    q: Any
    k: Any
    v: Any
    schedule: Any
    work: Any
    ends: Any
    cols: Any | None
    ids: tuple[Any, Any] | None
    o: Any
    lse: Any


@dataclasses.dataclass(frozen=True)
class Job:
    """One program's view of the problem.

    Attributes:
      tiles: the tile sizes.
      scale: of the scores.
      head_dim: H.
      group: query heads of a kv head.
      row_tiles: how many of the queries there are; an item is head * row_tiles + place in the
        work list, and a head of it is `tiles.heads` query heads.
      two_passes: whether the first pass keeps its offsets, and a second looks after what that
        cannot hold.
      program: which of the grid.
      items: how many it has.
      gmem: refs to global memory.
      smem: `forward.scratch`, by its names.
    """

    tiles: ForwardTiles
    scale: float
    head_dim: int
    group: int
    row_tiles: int
    two_passes: bool
    program: jax.Array
    items: jax.Array
    gmem: Gmem
    smem: types.SimpleNamespace

    @property
    def flags(self) -> int:
        """How many there are for items to be done again; one more says whether any is set."""
        return self.smem.again_smem.shape[1] - 1

    def column(self, start, j):
        """First key of the j-th tile of an item: they are neighbours, or listed."""
        if self.gmem.cols is None:
            return start + j * self.tiles.block_kv
        return self.gmem.cols[start + j]

    def ends_short(self, columns, j, careful: bool):
        """Whether the j-th tile, where these columns may end, is a short one.

        Never in the second pass, which runs too seldom for more code.
        """
        if self.tiles.block_kv == SHORT or careful and self.two_passes:
            return False
        return columns - j * self.tiles.block_kv <= SHORT

    def item_slot(self, i, consumer):
        """Index of the barriers of a consumer's part of the i-th item."""
        return lax.rem(i, jnp.int32(ITEM_SLOTS)) * CONSUMERS + consumer

    def by_head(self, row_tile, head, consumer):
        """Of each query head: the consumer's queries, its number, and its rows in their tile.

        A warpgroup's rows are head-major.
        """
        group = self.tiles.group
        token = pl.multiple_of(row_tile * (CONSUMERS * group) + consumer * group, block_map.ALIGN)
        for h in range(self.tiles.heads):
            yield pl.ds(token, group), head * self.tiles.heads + h, pl.ds(h * group, group)


def either(condition, if_true, if_false, *operands):
    """`lax.cond` that leaves out the branch which is known, while tracing, not to be taken."""
    if condition is False:
        return if_false(*operands)
    return lax.cond(condition, if_true, if_false, *operands)
