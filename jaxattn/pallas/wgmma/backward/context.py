"""What a program of the backward kernel works with: sizes known while tracing, refs, its keys."""

import dataclasses
import enum
import types
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from jaxattn import block_map
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.tiles import BackwardTiles

# Tiles of queries that a program walks over in one head before it turns to the next.
STRETCH = 32


class Gmem(NamedTuple):
    """Refs to global memory; heads lie side by side, [.., N * H].

    Attributes:
      q: [R, N * H].
      k: [C, K * H].
      v: [C, K * H].
      do: [R, N * H].
      lse: [N * rows].
      delta: [N * rows].
      dq: fp32 [R, N * H], or None where it is not wanted.
      work: `BlockMap.work` of keys.
      ends: `BlockMap.ends` of keys.
      cols: the queries to visit, if there is a pattern.
      ids: those of keys and of queries, if there are documents.
      dk: [C, K * H].
      dv: [C, K * H].
    """

    q: Any
    k: Any
    v: Any
    do: Any
    lse: Any
    delta: Any
    dq: Any | None
    work: Any
    ends: Any
    cols: Any | None
    ids: tuple[Any, Any] | None
    dk: Any
    dv: Any


class _Barriers(enum.IntEnum):
    """First index of each barrier; those of a ring have one index a stage."""

    KV_FULL = 0
    ENDS_FULL = 1
    DS_FULL = 2
    RINGS = 3


class Ring:
    """A ring of barriers inside the one Barrier object."""

    def __init__(self, barriers, index: int, stages: int):
        self._barriers, self._first = barriers, _Barriers.RINGS + index * stages
        self._stages = stages

    def __getitem__(self, i):
        """The barrier of the i-th tile's stage."""
        return self._barriers.at[self._first + ring_slot(i, self._stages)]


class Barriers:
    """The kernel's barriers by their names, in one Barrier object."""

    def __init__(self, barriers, stages: int):
        self.kv_full, self.ends_full, self.ds_full = (
            barriers.at[i] for i in (_Barriers.KV_FULL, _Barriers.ENDS_FULL, _Barriers.DS_FULL)
        )
        rings = (Ring(barriers, i, stages) for i in range(4))
        self.q_full, self.q_free, self.do_full, self.do_free = rings

    @staticmethod
    def count(stages: int) -> int:
        """How many there are."""
        return _Barriers.RINGS + 4 * stages


@dataclasses.dataclass(frozen=True)
class Job:
    """One program's view of the problem.

    Attributes:
      tiles: the tile sizes.
      scale: of the scores.
      head_dim: H.
      heads: query heads of a kv head.
      stride: numbers of a head in lse and delta.
      dq_part: rows and columns of dQ that one consumer computes.
      gmem: refs to global memory.
      smem: `backward.scratch` by its names.
      barriers: likewise.
      row: the program's place in the work list.
      kv_head: its kv head.
      key: its first key.
      start: where its queries begin, or their list.
      count: how many tiles of them there are in a head.
    """

    tiles: BackwardTiles
    scale: float
    head_dim: int
    heads: int
    stride: int
    dq_part: tuple[int, int]
    gmem: Gmem
    smem: types.SimpleNamespace
    barriers: Barriers
    row: jax.Array
    kv_head: jax.Array
    key: jax.Array
    start: jax.Array
    count: jax.Array

    def each_tile(self, body) -> None:
        """Runs body(query head, query tile, how many came before).

        A stretch of queries after another, from the last to the first, and each for all heads.
        The programs that run at once own neighbouring keys, which the same last queries see:
        so they read the same few tiles of Q and dO, and add to the same tiles of dQ, while
        these are in the L2 cache. Head after head they would drift apart, programs of fewer
        tiles ahead, until they were in different heads.
        """
        heads = jnp.int32(self.heads)

        @pl.loop(0, lax.div(self.count + STRETCH - 1, jnp.int32(STRETCH)) * heads)
        def _(i):
            stretch, g = lax.div(i, heads), lax.rem(i, heads)
            done = stretch * STRETCH  # of the tiles, in every head
            length = jnp.minimum(self.count - done, STRETCH)
            before = done * heads + length * g

            @pl.loop(0, length)
            def _(j):
                body(self.kv_head * heads + g, self.count - 1 - done - j, before + j)

    def column(self, t):
        """First query of the t-th tile: they are neighbours, or listed."""
        if self.gmem.cols is None:
            return self.start + t * self.tiles.block_q
        return self.gmem.cols[self.start + t]

    def first_query(self, t):
        """The same, known to be aligned."""
        return pl.multiple_of(self.column(t), block_map.ALIGN)

    def head_cols(self, head):
        """Where a head's columns are, of queries or of keys."""
        return pl.ds(head * self.head_dim, self.head_dim)
