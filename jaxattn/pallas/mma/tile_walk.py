"""The Q tiles that a program of the backward kernel visits, in order, kept in shared memory."""

import jax.experimental.pallas as pl
import jax.numpy as jnp

from jaxattn.pallas.mma.work_tile import WorkTile
from jaxattn.pallas.smem import ring_slot

# Q tiles that a program processes in one head before it turns to the next head: programs that run
# at once then read the same tiles of Q and dO, and add to the same tiles of dQ, while these are in
# the L2 cache.
Q_CHUNK = 32
# Iterations whose tiles are kept: the one before, the current one, and two ahead.
RING = 4
# Numbers of an entry, padded: tile, token, head, and its place in the order: tiles of the chunks
# before, head of the group, tile in the chunk.
ENTRY = 8


class TileWalk:
    """Walk over the Q tiles of a work list's entry and the query heads of a group.

    All tiles of a chunk for one head, then for the next head, then the next chunk; from the last
    tile to the first. The i-th iteration's tile, first token and head are read from shared memory
    where they are needed, because on sm_80 no registers are left to keep them. They are written two
    iterations ahead, so that nothing waits for the load of a token from global memory.

    All threads write the same numbers, so each reads what it wrote itself. The barrier at the start
    of an iteration keeps them from overwriting an entry that another thread still reads.
    """

    def __init__(self, ring, tile: WorkTile, first_head, group: int):
        """Write the entries of the first two iterations.

        Args:
          ring: ref int32 [RING, ENTRY] in shared memory.
          tile: the work list's entry.
          first_head: first query head of the group, int32.
          group: query heads of the group.
        """
        self._ring, self._tile, self._group = ring, tile, group

        @pl.when(tile.count > 0)
        def _():
            self.write(jnp.int32(0), self._entry(first_head, (jnp.int32(0),) * 3))
            self.write(jnp.int32(1), self.entry(jnp.int32(1)))

    def tile(self, i):
        """Return the i-th iteration's Q tile."""
        return self._ring[ring_slot(i, RING), 0]

    def token(self, i):
        """Return the first token of the tile."""
        return self._ring[ring_slot(i, RING), 1]

    def head(self, i):
        """Return the query head."""
        return self._ring[ring_slot(i, RING), 2]

    def entry(self, i) -> tuple:
        """Return the entry of the i-th iteration, from that of the one before."""
        before = ring_slot(i - 1, RING)
        head, offset, g, j = (self._ring[before, n] for n in range(2, 6))
        last = j + 1 == jnp.minimum(self._tile.count - offset, Q_CHUNK)
        last_head = last & (g + 1 == self._group)
        step = jnp.where(last_head, 1 - self._group, 1)
        position = (
            jnp.where(last_head, offset + Q_CHUNK, offset),
            jnp.where(last, jnp.where(last_head, 0, g + 1), g),
            jnp.where(last, 0, j + 1),
        )
        return self._entry(jnp.where(last, head + step, head), position)

    def write(self, i, entry: tuple) -> None:
        """Write the entry of the i-th iteration, over that of iteration i - RING."""
        slot = ring_slot(i, RING)
        for n, number in enumerate(entry):
            self._ring[slot, n] = number

    def _entry(self, head, position) -> tuple:
        offset, _, j = position
        # Beyond the last iteration: an entry that is not used, of a tile that exists.
        t = jnp.maximum(self._tile.count - 1 - offset - j, 0)
        return t, self._tile.column(t), head, *position
