"""The order of the Q tiles of a program of the backward kernel."""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.pallas.mma.tile_walk import ENTRY, Q_CHUNK, RING, TileWalk
from jaxattn.pallas.mma.work_tile import WorkTile

FIRST_HEAD = 8


class Entry(WorkTile):
    """An entry of a work list without its rows."""

    def __init__(self, count: int, columns):
        self._count, self._columns = count, columns

    count = property(lambda self: jnp.int32(self._count))

    def column(self, j):
        return self._columns[j]


def walked(count: int, group: int, columns) -> np.ndarray:
    """Return (tile, token, head) of each iteration, entries written two iterations ahead."""
    total = count * group

    def kernel(columns, out, ring):
        walk = TileWalk(ring, Entry(count, columns), jnp.int32(FIRST_HEAD), group)

        @pl.loop(0, total)
        def _(i):
            ahead = walk.entry(i + 2)
            walk.write(i + 2, ahead)
            # The iteration before may still be read.
            before = jnp.maximum(i - 1, 0)
            for j in (before, i):
                out[j, 0], out[j, 1], out[j, 2] = walk.tile(j), walk.token(j), walk.head(j)

    ring = jax.ShapeDtypeStruct((RING, ENTRY), jnp.int32)
    numbers = jax.ShapeDtypeStruct((max(total, 1), 3), jnp.int32)
    out, _ = pl.pallas_call(kernel, out_shape=(numbers, ring), interpret=True)(columns)
    return np.asarray(out)[:total]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, Q_CHUNK, Q_CHUNK + 1, 2 * Q_CHUNK + 5])
def test_chunks_then_heads_then_tiles(count, group):
    """From the last tile to the first: a chunk for each head, then the next chunk."""
    columns = jnp.asarray(np.random.default_rng(count).integers(0, 1000, count + 1), jnp.int32)
    want = [
        (count - 1 - j, columns[count - 1 - j], FIRST_HEAD + g)
        for offset in range(0, count, Q_CHUNK)
        for g in range(group)
        for j in range(offset, min(offset + Q_CHUNK, count))
    ]
    got = walked(count, group, columns)
    np.testing.assert_array_equal(got, np.asarray(want, np.int32).reshape(-1, 3))
