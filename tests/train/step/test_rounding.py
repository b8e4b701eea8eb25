"""Stochastic rounding is right on average, and the same wherever and whenever it happens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train.step.rounding import random_bits, round_weights, to_bfloat16


def test_bits_are_uniform_and_independent():
    """Every bit is set half of the time, and follows no other element, step or stream."""
    a = np.asarray(random_bits((64, 1024), jnp.int32(3), 0)).reshape(-1)
    for b in (
        np.roll(a, 1),
        np.asarray(random_bits((64, 1024), jnp.int32(4), 0)).reshape(-1),
        np.asarray(random_bits((64, 1024), jnp.int32(3), 1)).reshape(-1),
    ):
        for bits in (a, a ^ b):
            shares = [np.mean((bits >> i) & 1) for i in range(32)]
            np.testing.assert_allclose(shares, 0.5, atol=0.01)  # 5 sigma at 65,536


def test_rounding_is_unbiased_and_to_a_neighbor():
    x = jnp.full((100_000,), 1.0 + 1 / 1024)  # neighbors in bfloat16: 1 and 1 + 1/128
    rounded = np.asarray(to_bfloat16(x, random_bits(x.shape, jnp.int32(0), 0)), np.float32)
    assert set(rounded.tolist()) == {1.0, 1 + 1 / 128}
    np.testing.assert_allclose(rounded.mean(), 1 + 1 / 1024, atol=5 * 0.0026 / 316)


def test_what_bfloat16_has_is_not_rounded():
    x = jnp.array([0.0, -1.5, 3e38, jnp.inf, -jnp.inf])
    exact = x.astype(jnp.bfloat16).astype(jnp.float32)
    got = to_bfloat16(exact, jnp.full(x.shape, 0xFFFFFFFF, jnp.uint32))
    np.testing.assert_array_equal(got.astype(jnp.float32), exact)
    assert jnp.isnan(to_bfloat16(jnp.array([jnp.nan]), jnp.full((1,), 0xFFFF, jnp.uint32)))[0]


def test_a_mesh_changes_no_bit():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    draw = jax.jit(
        lambda: random_bits((16, 24), jnp.int32(7), 5),
        out_shardings=NamedSharding(mesh, P("x")),
    )
    np.testing.assert_array_equal(draw(), random_bits((16, 24), jnp.int32(7), 5))


def test_small_updates_add_up():
    """1,000 updates of 1e-4 to a weight of 1: to the nearest, nothing would ever happen."""
    tx = round_weights()
    weights = {"w": jnp.ones((256,), jnp.bfloat16)}
    state = tx.init(weights)

    def step(carry, _):
        weights, state = carry
        updates, state = tx.update({"w": jnp.full((256,), 1e-4)}, state, weights)
        with jax.numpy_dtype_promotion("standard"):
            return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (weights, state), length=1000)
    got = np.asarray(weights["w"], np.float32)
    np.testing.assert_allclose(got.mean(), 1.1, atol=0.005)
