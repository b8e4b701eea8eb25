"""Stochastic rounding: up or down at random, so that small changes are kept on average.

To the nearest, a weight in bfloat16 (8 bits) would ignore every update below 1/512 of it, and a
moment in 8 bits every decay below its step. The random numbers are a hash of the element's index
and a seed: they cost a few integer operations inside the update, no memory, and are the same on
any mesh and after any resume.

References:
    "Revisiting BFloat16 Training", Zamirai et al. 2020, arXiv:2010.06192, section 3.
    The hash: lowbias32 of C. Wellons' hash-prospector, whose low bias was found by search.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt32


def random_bits(
    shape: tuple[int, ...], step: jax.Array, stream: int | jax.Array
) -> UInt32[Array, "..."]:
    """32 random bits for each element.

    Args:
        shape: of the result.
        step: int32 scalar.
        stream: tells arrays apart that are rounded in the same step.
    """
    seed = _hash(_hash(step.astype(jnp.uint32)) + jnp.asarray(stream, jnp.uint32))
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):  # row-major; it may wrap: 4e9 elements apart
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _hash(index * jnp.uint32(0x9E3779B9) + seed)


def to_bfloat16(x: Float[Array, "*shape"], bits: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds float32 to one of its two neighbours in bfloat16, the nearer one more often."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32: a random lower half carries with its probability
    raw = (raw + (bits & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(raw, jnp.float32).astype(jnp.bfloat16)


class RoundedState(NamedTuple):
    """What the random numbers of `round_weights` depend on.

    Attributes:
        count: int32 scalar, steps done.
    """

    count: jax.Array


def round_weights() -> optax.GradientTransformation:
    """Turns float32 updates into ones that lead from bfloat16 weights to bfloat16 weights.

    Last in a chain. weight + update is then exact, so that whoever adds them rounds nothing.
    """

    def init(params) -> RoundedState:
        return RoundedState(count=jnp.int32(0))

    def update(updates, state, params=None):
        leaves, tree = jax.tree.flatten(updates)
        rounded = []
        for i, (u, p) in enumerate(zip(leaves, tree.flatten_up_to(params), strict=True)):
            old = p.astype(jnp.float32)
            # 2 ** 16 and on: apart from the streams of the moments
            new = to_bfloat16(old + u, random_bits(u.shape, state.count, 2**16 + i))
            rounded.append(new.astype(jnp.float32) - old)
        return tree.unflatten(rounded), RoundedState(count=state.count + 1)

    return optax.GradientTransformation(init, update)


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
