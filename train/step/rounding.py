"""Stochastic rounding: round up or down at random, so that small changes are kept on average.

Rounding to nearest would lose every update of a bfloat16 weight (8 bits) below 1/512 of the weight.
The random numbers are a hash of the element's index and a seed: a few integer operations inside the
update, no memory, and the same on any mesh and after any resume.

References:
    "Revisiting BFloat16 Training", Zamirai et al. 2020, arXiv:2010.06192, section 3.
    The hash: lowbias32 of C. Wellons' hash-prospector, whose low bias was found by search.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layer"], meta_fields=["streams"])
@dataclasses.dataclass(frozen=True)
class Place:
    """Locate the arrays of an update among all weights, to draw the random bits of whole arrays.

    Attributes:
        streams: for each array, the position of its whole array among the weights.
        layer: int32 scalar, the layer that the arrays are of; None: they are whole.
    """

    streams: tuple[int, ...]
    layer: Any = None  # an array, or what a transformation of jax puts in its place


def random_bits(
    shape: tuple[int, ...],
    step: jax.Array,
    stream: int | jax.Array,
    layer: jax.Array | None = None,
) -> UInt32[Array, "..."]:
    """Return 32 random bits for each element.

    Args:
        shape: of the result.
        step: int32 scalar.
        stream: a different number for each array that is rounded in the same step.
        layer: int32 scalar: the bits of this element of the first axis of a larger array; None: of
            an array of this shape.
    """
    seed = _hash(_hash(step.astype(jnp.uint32)) + jnp.asarray(stream, jnp.uint32))
    first = jnp.uint32(0) if layer is None else layer.astype(jnp.uint32)
    index = jnp.full(shape, first, jnp.uint32)
    for axis, size in enumerate(shape):  # row-major; it may wrap: 4e9 elements apart
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _hash(index * jnp.uint32(0x9E3779B9) + seed)


def to_bfloat16(x: Float[Array, "*shape"], bits: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Round float32 to one of its two bfloat16 neighbors, the nearer one more often."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of float32: a random lower half carries with its probability
    raw = (raw + (bits & jnp.uint32(0xFFFF))) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(raw, jnp.float32).astype(jnp.bfloat16)


class RoundedState(NamedTuple):
    """State of `round_weights`: the seed of its random numbers.

    Attributes:
        count: int32 scalar, updates done.
    """

    count: jax.Array


def round_weights() -> optax.GradientTransformationExtraArgs:
    """Round float32 updates so that bfloat16 weight + update is a bfloat16 number.

    Must be the last transformation of a chain. The sum is then exact in bfloat16. `update` takes
    the `place` of a part of the weights.
    """

    def init(params) -> RoundedState:
        return RoundedState(count=jnp.int32(0))

    def update(updates, state, params=None, *, place: Place | None = None, **_):
        leaves, tree = jax.tree.flatten(updates)
        place = place or Place(tuple(range(len(leaves))))
        rounded = []
        for i, (u, p) in enumerate(zip(leaves, tree.flatten_up_to(params), strict=True)):
            old = p.astype(jnp.float32)
            # 2 ** 16 and on: apart from the streams of the moments
            stream = 2**16 + place.streams[i]
            new = to_bfloat16(old + u, random_bits(u.shape, state.count, stream, place.layer))
            rounded.append(new.astype(jnp.float32) - old)
        return tree.unflatten(rounded), RoundedState(count=state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _hash(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
