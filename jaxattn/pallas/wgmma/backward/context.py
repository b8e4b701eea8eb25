"""Context of a backward program: sizes known while tracing, refs to memory, barriers, its keys."""

import dataclasses
import types

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from jaxattn import block_map
from jaxattn.pallas.smem import ring_slot
from jaxattn.pallas.wgmma.tiles import BackwardTiles

# Q tiles that a program processes in one head before it turns to the next head.
Q_CHUNK = 32


class Ring:
    """Ring of barriers inside the one Barrier object."""

    def __init__(self, barriers, first: int, stages: int):
        self._barriers, self._first, self._stages = barriers, first, stages

    def __getitem__(self, i):
        """Return the barrier of the i-th tile's stage."""
        return self._barriers.at[self._first + ring_slot(i, self._stages)]


class Barriers:
    """Barriers of the kernel by name, in one Barrier object: three, then four rings."""

    def __init__(self, barriers, stages: int):
        self.kv_full, self.bounds_full, self.ds_full = (barriers.at[i] for i in range(3))
        rings = (Ring(barriers, 3 + i * stages, stages) for i in range(4))
        self.q_full, self.q_free, self.do_full, self.do_free = rings

    @staticmethod
    def count(stages: int) -> int:
        """Return the number of barriers."""
        return 3 + 4 * stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelContext:
    """Context of one program of the backward kernel.

    Attributes:
      tiles: the tile sizes.
      scale: factor on the scores.
      head_dim: H.
      qheads_per_kvhead: query heads of a kv head, N / K.
      stride: elements of one head in lse and delta.
      dq_part: (rows, columns) of dQ that one consumer computes.
      gmem: refs to global memory, by the names of the kernel's inputs and outputs; the heads of a
        token are neighbors, [tokens, heads * H].
      smem: refs to shared memory, by the names of `kernel.scratch`.
      barriers: the barriers.
      row: index of the program's row tile in the work list.
      kv_head: kv head of the program.
      key: first key of the program.
      start: START of the work list.
      count: Q tiles of one head.
    """

    tiles: BackwardTiles
    scale: float
    head_dim: int
    qheads_per_kvhead: int
    stride: int
    dq_part: tuple[int, int]
    gmem: types.SimpleNamespace
    smem: types.SimpleNamespace
    barriers: Barriers
    row: jax.Array
    kv_head: jax.Array
    key: jax.Array
    start: jax.Array
    count: jax.Array

    def work_loop(self, mainloop) -> None:
        """Run mainloop(query head, Q tile, number of tiles before).

        Chunks of `Q_CHUNK` tiles, from the last to the first, and each chunk for all heads. The
        programs that run at once own neighboring keys, which the same last queries see. So they
        read the same few tiles of Q and dO, and add to the same tiles of dQ, while these are in
        the L2 cache. Head after head they would drift apart, programs of fewer tiles ahead, until
        they were in different heads.
        """
        heads = jnp.int32(self.qheads_per_kvhead)

        @pl.loop(0, lax.div(self.count + Q_CHUNK - 1, jnp.int32(Q_CHUNK)) * heads)
        def _(i):
            chunk, g = lax.div(i, heads), lax.rem(i, heads)
            offset = chunk * Q_CHUNK  # tiles of the chunks before, in every head
            length = jnp.minimum(self.count - offset, Q_CHUNK)
            before = offset * heads + length * g

            @pl.loop(0, length)
            def _(j):
                mainloop(self.kv_head * heads + g, self.count - 1 - offset - j, before + j)

    def q_column(self, t):
        """Return the first query of the t-th Q tile."""
        if self.gmem.cols is None:
            return self.start + t * self.tiles.block_q
        return self.gmem.cols[self.start + t]

    def aligned_q_column(self, t):
        """Return the first query of the t-th Q tile, marked as aligned for TMA."""
        return pl.multiple_of(self.q_column(t), block_map.ALIGN)

    def head_slice(self, head):
        """Return the slice of [.., heads * H] that holds a head, of queries or of keys."""
        return pl.ds(head * self.head_dim, self.head_dim)
