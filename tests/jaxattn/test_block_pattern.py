"""Lists of live tiles: the example of docs/kernel.md, and ranges that meet no live tile."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.block_pattern import live_tiles
from jaxattn.mask import BLOCK

ROW = [1, 0, 1, 1, 0, 0, 1, 1]


def test_the_example_of_the_readme():
    """Live tiles first and in order; how many stand before each, and before the end."""
    tiles = live_tiles(jnp.asarray([[ROW]], bool), BLOCK)
    assert (tiles.cols_BPW[0, 0, :5] // BLOCK).tolist() == [0, 2, 3, 6, 7]
    assert tiles.before_BPW[0, 0].tolist() == [0, 1, 1, 2, 3, 3, 3, 4, 5]


@pytest.mark.parametrize("tile", [128, 64, 16])
def test_ranges_are_what_is_left_of_them(tile):
    """For all ranges: the columns listed from first to last are the live columns of the range."""
    tiles = live_tiles(jnp.asarray([[ROW]], bool), tile)
    live = np.flatnonzero(np.repeat(ROW, BLOCK))
    rng = np.random.default_rng(0)
    first = rng.integers(0, len(ROW) * BLOCK, BLOCK)
    last = first + rng.integers(0, 500, BLOCK)  # also beyond the end
    low, high = tiles.listed(jnp.asarray(first)[None], jnp.asarray(last)[None])
    for a, b, x, y in zip(first, last, np.asarray(low)[0], np.asarray(high)[0], strict=True):
        want = live[(live >= a) & (live <= b)]
        np.testing.assert_array_equal(live[x : y + 1] if x <= y else [], want)
