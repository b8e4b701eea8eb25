"""Low-bit Adam: each of the two moments takes 2 bytes or 1 byte a parameter instead of 4.

A moment is read, updated in float32, and written back with stochastic rounding. A decay rate of
0.999 changes a moment by less than the distance of two representable numbers; rounding to nearest
would lose the change.

int8: blocks of up to 256 numbers along the last axis share a float32 scale, their largest absolute
value. Codes are cubic, (c/127)^3 with a sign and (c/255)^3 without, so that a block spans numbers
of 1 to 2e6, or 1 to 1.7e7. The second moment is stored as its root. Adam divides by the root, and
a root rounded to zero would give a huge step: positive numbers never become zero. Codes have the
parameter's shape and sharding. Norms and biases are few and stay float32.

References:
    "8-bit Optimizers via Block-wise Quantization", Dettmers et al. 2022, arXiv:2110.02861: blocks,
    and why codes must not be linear. The paper uses a table of codes, this module a power.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt32

from train.step.rounding import Place, random_bits, to_bfloat16

BLOCK = 256
"""Largest number of elements that share a scale."""


class Quantized(NamedTuple):
    """An array quantized to 8 bits.

    Attributes:
        codes: int8 (signed) or uint8, with the parameter's shape and sharding.
        scales: float32, one for each block of the last axis.
    """

    codes: jax.Array
    scales: jax.Array


class Adam8bitState(NamedTuple):
    """State of low-bit Adam.

    Attributes:
        count: int32 scalar, updates done.
        mu: first moments, a tree like the parameters: float32, bfloat16 or `Quantized`.
        nu: roots of the second moments.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam8bit(
    b1: float,
    b2: float,
    *,
    eps: float = 1e-8,
    moment_dtype: Literal["bf16", "int8"],
    low_bit: Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
    """Return Adam's direction, m / (sqrt(v) + eps) of the unbiased moments.

    `update` takes the `place` of a part of the weights (`train.step.rounding.Place`).

    Args:
        b1: decay of the first moment.
        b2: decay of the second.
        eps: added to the denominator.
        moment_dtype: storage type of the moments.
        low_bit: tree of parameters -> tree of flags; False: float32 moments.
    """

    def init(params) -> Adam8bitState:
        def zeros(dtype) -> Any:
            def one(p, small):
                if not small:
                    return jnp.zeros_like(p, jnp.float32)
                if moment_dtype == "bf16":
                    return jnp.zeros_like(p, jnp.bfloat16)
                return Quantized(jnp.zeros_like(p, dtype), _scales_like(p))

            return jax.tree.map(one, params, low_bit(params))

        return Adam8bitState(jnp.int32(0), zeros(jnp.int8), zeros(jnp.uint8))

    def update(updates, state, params=None, *, place: Place | None = None, **_):
        count = state.count + 1
        gradients, tree = jax.tree.flatten(updates)
        moments = zip(tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True)
        place = place or Place(tuple(range(len(gradients))))
        directions, mus, nus = [], [], []
        for i, (g, (mu, nu)) in enumerate(zip(gradients, moments, strict=True)):
            m = b1 * _read(mu) + (1 - b1) * g
            v = b2 * jnp.square(_read(nu)) + (1 - b2) * jnp.square(g)
            unbiased_m = m / (1 - b1 ** count.astype(jnp.float32))
            unbiased_v = v / (1 - b2 ** count.astype(jnp.float32))
            directions.append(unbiased_m / (jnp.sqrt(unbiased_v) + eps))
            bits = functools.partial(random_bits, g.shape, count, layer=place.layer)
            mus.append(_write(m, mu, bits(2 * place.streams[i])))
            nus.append(_write(jnp.sqrt(v), nu, bits(2 * place.streams[i] + 1)))
        new = Adam8bitState(count, tree.unflatten(mus), tree.unflatten(nus))
        return tree.unflatten(directions), new

    return optax.GradientTransformationExtraArgs(init, update)


def block_size(last: int) -> int:
    """Return the block length: the largest power of two that divides the axis, up to `BLOCK`.

    The length does not depend on the mesh, so that a checkpoint can move to another mesh.
    """
    return min(BLOCK, last & -last)


def quantize(
    x: Float[Array, "*shape"], bits: UInt32[Array, "*shape"], *, signed: bool
) -> Quantized:
    """Quantize to 8 bits; random bits choose one of the two neighboring codes."""
    blocks = _blocks(x)
    scales = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    share = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1.0)  # 0 to 1
    top = 127 if signed else 255
    level = top * jnp.cbrt(share)
    up = _blocks(bits >> 8).astype(jnp.float32) * 2.0**-24  # [0, 1), exact in float32
    codes = jnp.minimum(jnp.floor(level + up), top)
    if signed:
        codes = jnp.sign(blocks) * codes
    else:
        codes = jnp.where(blocks > 0, jnp.maximum(codes, 1.0), 0.0)
    codes = codes.reshape(x.shape).astype(jnp.int8 if signed else jnp.uint8)
    return Quantized(codes=codes, scales=scales[..., 0])


def dequantize(q: Quantized) -> Float[Array, "..."]:
    """Return the float32 values."""
    signed = q.codes.dtype == jnp.int8
    level = _blocks(q.codes.astype(jnp.float32)) * (1 / (127 if signed else 255))
    return (level * level * level * q.scales[..., None]).reshape(q.codes.shape)


def _read(moment: Any) -> jax.Array:
    return dequantize(moment) if isinstance(moment, Quantized) else moment.astype(jnp.float32)


def _write(x: jax.Array, like: Any, bits: jax.Array) -> Any:
    if isinstance(like, Quantized):
        return quantize(x, bits, signed=like.codes.dtype == jnp.int8)
    return to_bfloat16(x, bits) if like.dtype == jnp.bfloat16 else x


def _blocks(x: jax.Array) -> jax.Array:
    """Reshape [..., last] -> [..., blocks, block]."""
    block = block_size(x.shape[-1])
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _scales_like(p: jax.Array) -> jax.Array:
    """Return zero scales, sharded like the parameter where the number of blocks divides."""
    zeros = jnp.zeros((*p.shape[:-1], p.shape[-1] // block_size(p.shape[-1])), jnp.float32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return zeros
    *others, last = jax.typeof(p).sharding.spec
    names = last if isinstance(last, tuple) else (last,)
    parts = functools.reduce(lambda n, name: n * mesh.shape.get(name, 1), names, 1)
    return jax.sharding.reshard(zeros, P(*others, last if zeros.shape[-1] % parts == 0 else None))
