"""Moments in 8 or 16 bits follow those in 32, take the memory they promise, and never vanish."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.step.adam8bit import (
    Quantized,
    block_size,
    dequantize,
    quantize,
    scale_by_adam8bit,
)
from train.step.rounding import random_bits

SHAPE = (64, 512)


def spread(seed: int, decades: float) -> jax.Array:
    """Numbers of either sign over some orders of magnitude, and zeros."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 1.0], SHAPE) * 10 ** rng.uniform(-decades, 0, SHAPE)
    x[:, ::100] = 0
    return jnp.asarray(x, jnp.float32)


def bits(step: int = 0) -> jax.Array:
    return random_bits(SHAPE, jnp.int32(step), 0)


@pytest.mark.parametrize(("signed", "decades"), [(True, 5), (False, 6)])
def test_codes_are_close_over_many_decades(signed, decades):
    """The error is below the distance to the next code, for small and large numbers of a block."""
    x = spread(0, decades)
    x = x if signed else jnp.abs(x)
    q = quantize(x, bits(), signed=signed)
    assert q.codes.dtype == (jnp.int8 if signed else jnp.uint8) and q.scales.shape == (64, 2)
    got, want = np.asarray(dequantize(q)), np.asarray(x)
    top = 127 if signed else 255
    level = np.cbrt(np.abs(want)) * top
    ceiling = ((level + 1) / top) ** 3 - np.abs(want)  # at least as far as the code above
    assert np.all(np.abs(got - want) <= 1.05 * ceiling)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_unbiased_in_the_code(signed):
    x = jnp.abs(spread(1, 2))
    top = 127 if signed else 255
    codes = [quantize(x, bits(i), signed=signed).codes.astype(jnp.float32) for i in range(64)]
    block_max = jnp.max(x.reshape(64, 2, 256), axis=-1, keepdims=True)
    level = top * (x.reshape(64, 2, 256) / block_max).reshape(SHAPE) ** (1 / 3)
    difference = np.asarray(jnp.mean(jnp.stack(codes), axis=0) - level)
    assert abs(difference.mean()) < 5e-3 and np.abs(difference).max() < 0.5


def test_second_moment_above_zero_stays_above_zero():
    """Its root is divided by."""
    v = jnp.full(SHAPE, 1e-30).at[:, 0].set(1.0)
    assert float(dequantize(quantize(v, bits(), signed=False)).min()) > 0
    zero = quantize(jnp.zeros(SHAPE), bits(), signed=False)
    np.testing.assert_array_equal(dequantize(zero), 0)


@pytest.mark.parametrize(("last", "block"), [(8192, 256), (128, 128), (92544, 128), (30, 2)])
def test_blocks_divide_the_axis(last, block):
    assert block_size(last) == block


@pytest.mark.parametrize(("state", "tolerance"), [("bf16", 0.02), ("int8", 0.15)])
@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_directions_follow_adams(state, tolerance, b2):
    """Over 100 steps of noisy gradients of all sizes: the error is noise, without a bias."""
    compact = scale_by_adam8bit(0.9, b2, moment_dtype=state, low_bit=lambda p: {"w": True})
    exact = optax.scale_by_adam(0.9, b2)
    sizes = jnp.abs(spread(2, 3)) + 1e-4
    params = {"w": jnp.zeros(SHAPE)}

    def step(carry, key):
        ours, theirs = carry
        g = {"w": sizes * (1 + jax.random.normal(key, SHAPE))}
        a, ours = compact.update(g, ours)
        with jax.numpy_dtype_promotion("standard"):
            b, theirs = exact.update(g, theirs)
        return (ours, theirs), (a["w"], b["w"])

    start = compact.init(params), exact.init(params)
    _, (ours, theirs) = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 100))
    error = np.asarray(ours - theirs)[-20:]
    assert np.sqrt(np.mean(error**2)) < tolerance * np.sqrt(np.mean(np.asarray(theirs) ** 2))
    assert abs(error.mean()) < 0.1 * tolerance


def test_int8_takes_two_bytes_and_leaves_norms_alone():
    tx = scale_by_adam8bit(
        0.9, 0.95, moment_dtype="int8", low_bit=lambda p: {"w": True, "norm": False}
    )
    state = tx.init({"w": jnp.zeros(SHAPE), "norm": jnp.zeros((512,))})
    assert isinstance(state.mu["w"], Quantized) and state.nu["norm"].dtype == jnp.float32
    held = sum(a.nbytes for a in jax.tree.leaves((state.mu["w"], state.nu["w"])))
    assert held == 64 * 512 * (2 + 8 / 256)
