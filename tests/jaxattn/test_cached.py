"""One query over a cache: against eager, whatever is filled, and in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import Mask, attention, cached
from jaxattn.cached import BLOCK

pytestmark = pytest.mark.usefixtures("compile_quickly")

# As a model calls it; operation by operation most of the time went into compiling each of them.
attend_cached = jax.jit(cached.attend_cached, static_argnames="scale")


def problem(S, K, G, dtype, seed=0):
    """Q [2, 1, N, H], k and v [2, S, K, 32], and which slots are filled."""
    rng = np.random.default_rng(seed)
    shapes = ((2, 1, K * G, 32), (2, S, K, 32), (2, S, K, 32))
    q, k, v = (jnp.asarray(2 * rng.standard_normal(shape, np.float32), dtype) for shape in shapes)
    filled = np.ones((2, S), np.int32)
    filled[0, : S // 3] = 0  # the padding of a short prompt
    filled[:, S - 5 :] = 0  # not written yet
    return q, k, v, jnp.asarray(filled)


@jax.jit
def wanted(q, k, v, filled):
    """Eager in fp32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    mask = Mask(segment_ids=jnp.ones((2, 1), jnp.int32), kv_segment_ids=filled, causal=False)
    return attention(q, k, v, mask, impl="eager")[:, 0]


@pytest.mark.parametrize("S", [64, 1000, 3 * BLOCK], ids=["small", "no multiple", "blocks"])
@pytest.mark.parametrize(("K", "G"), [(2, 2), (1, 6), (3, 1)])
def test_it_is_eager_attention(S, K, G):
    q, k, v, filled = problem(S, K, G, jnp.float32)
    with jax.default_matmul_precision("highest"):
        got = attend_cached(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), filled)
        np.testing.assert_allclose(got, wanted(q, k, v, filled), atol=1e-5)


def test_sums_are_fp32_in_bf16():
    """Its error stays that of rounding p and the result."""
    q, k, v, filled = problem(4 * BLOCK, 2, 2, jnp.bfloat16)
    got = attend_cached(q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), filled)
    assert got.dtype == jnp.bfloat16
    want = wanted(q, k, v, filled)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


def test_empty_slots_have_no_influence():
    """Not even where a whole block is empty and holds huge numbers."""
    q, k, v, filled = problem(2 * BLOCK, 2, 2, jnp.float32)
    filled = filled.at[:, :BLOCK].set(0)
    empty = (filled == 0)[:, :, None, None]
    a, b = (
        attend_cached(
            q[:, 0],
            jnp.where(empty, x, k).swapaxes(1, 2),
            jnp.where(empty, x, v).swapaxes(1, 2),
            filled,
        )
        for x in (jnp.float32(0), jnp.float32(1e4))
    )
    np.testing.assert_array_equal(a, b)


def test_the_scale_is_the_callers():
    q, k, v, filled = problem(64, 2, 2, jnp.float32)
    cache = (k.swapaxes(1, 2), v.swapaxes(1, 2), filled)
    got = attend_cached(q[:, 0], *cache, scale=0.5)
    np.testing.assert_allclose(got, attend_cached(q[:, 0] * 0.5 * 32**0.5, *cache), atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4), (2, 2, 64, 8), (2, 2, 64, 8), (2, 64)), "must have 3 axes"),
        (((2, 4, 8), (2, 2, 0, 8), (2, 2, 0, 8), (2, 0)), "no empty axis"),
        (((2, 4, 8), (2, 2, 64, 8), (2, 2, 63, 8), (2, 64)), r"v has shape \(2, 2, 63, 8\)"),
        (((1, 4, 8), (2, 2, 64, 8), (2, 2, 64, 8), (2, 64)), "agree in batch and head dim"),
        (((2, 4, 8), (2, 3, 64, 8), (2, 3, 64, 8), (2, 64)), "4 query heads .* 3 kv heads"),
        (((2, 4, 8), (2, 2, 64, 8), (2, 2, 64, 8), (2, 1)), r"filled .*, must be \(2, 64\)"),
    ],
    ids=["axes", "empty", "v", "batch", "heads", "filled"],
)
def test_contradicting_shapes(shapes, message):
    """One line, before anything is computed."""
    with pytest.raises(ValueError, match=message) as error:
        cached._check_shapes(*shapes)
    assert "\n" not in str(error.value)
