"""Sums by source are those of a loop over the sources."""

import jax.numpy as jnp
import numpy as np

from train.step.by_source import sum_by_source


def test_sums_are_those_of_each_source():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 7)).astype(np.float32)
    sources = rng.integers(0, 3, values.shape).astype(np.uint8)
    got = sum_by_source(jnp.asarray(values), jnp.asarray(sources), 4)  # the last has no position
    np.testing.assert_allclose(got, [values[sources == s].sum() for s in range(4)], rtol=1e-5)
    assert sum_by_source(None, None, 1).shape == (0,)
