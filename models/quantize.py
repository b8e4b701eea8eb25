"""Quantize frozen weights to NF4 or int8 and dequantize them a layer at a time.

NF4 stores a weight as the index of one of 16 levels, in blocks of 64 consecutive inputs that share
one scale, the block's largest absolute value. Double quantization stores these scales in 8 bits:
256 of them share a float32 factor, around the mean of all. That is 4.13 bits a weight. int8 stores
a weight as a multiple of 1/127 of the largest absolute value of its output.

Levels, blocks, their order and the rounding are those of bitsandbytes, so that a model quantized
here and there has the same weights.

A weight has its input axes first (D of wqkv_DKgH; N and H of wo_NHD). The last input axis I is the
one that is divided into blocks: `codes` has I / 64 blocks of 32 bytes, two inputs a byte.

References:
  Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E (NF4, double quantization);
  Dettmers et al. 2022, arXiv:2110.02861 (the 8-bit scales), arXiv:2208.07339 (int8 by rows);
  bitsandbytes 0.50, functional.py: quantize_4bit, create_dynamic_map, int8_vectorwise_quant.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from models import sharding

BLOCK = 64
"""Consecutive inputs that share a scale."""

SCALE_BLOCK = 256
"""Scales that share a float32 factor."""

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0.
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4:
    """Hold a weight in NF4 with double quantization, or a stack of them in leading axes.

    Attributes:
      codes: uint8 [*in, I / 64, 32, *out]; the high half of a byte is the earlier input.
      scales: uint8 [*in, I / 64, *out], indices into `scale_levels`.
      factors: float32 [S], for SCALE_BLOCK scales each, in the order outputs, then blocks.
      offset: float32 [], the mean of the scales.
      inputs: number of input axes.
    """

    codes: Any  # arrays; also structs, shardings or logical axes of them
    scales: Any
    factors: Any
    offset: Any
    inputs: int = dataclasses.field(metadata={"static": True})

    def axes_of(self, axes: tuple[str | None, ...]) -> "NF4":
        """Return the logical axes of each array, for the logical axes [*in, *out] of the weight."""
        ins, outs = axes[: self.inputs], axes[self.inputs :]
        return NF4(
            codes=(*ins, None, *outs), scales=axes, factors=(None,), offset=(), inputs=self.inputs
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8Rows:
    """Hold a weight in int8 with a scale for each output, or a stack of them in leading axes.

    Attributes:
      codes: int8 [*in, *out].
      scales: float32 [*out], the largest absolute value of each output's weights.
      inputs: number of input axes.
    """

    codes: Any  # arrays; also structs, shardings or logical axes of them
    scales: Any
    inputs: int = dataclasses.field(metadata={"static": True})

    def axes_of(self, axes: tuple[str | None, ...]) -> "Int8Rows":
        """Return the logical axes of each array, for the logical axes [*in, *out] of the weight."""
        return Int8Rows(codes=axes, scales=axes[self.inputs :], inputs=self.inputs)


Quantized = NF4 | Int8Rows


def quantize(w: Float[Array, "..."], kind: Literal["nf4", "int8"], *, inputs: int) -> Quantized:
    """Quantize one weight [*in, *out]; `inputs` is the number of input axes.

    Raises:
      ValueError: nf4, and the last input axis is not a multiple of 64.
    """
    return (_quantize_nf4 if kind == "nf4" else _quantize_int8)(w.astype(jnp.float32), inputs)


def quantize_like(like: Quantized, w: Float[Array, "..."]) -> Quantized:
    """Quantize a weight [*in, *out] in the format of another one."""
    return quantize(w, "nf4" if isinstance(like, NF4) else "int8", inputs=like.inputs)


def quantize_stack(like: Any, w_L: Array) -> Any:
    """Quantize a weight of all layers [L, *in, *out], one layer after the other.

    `like` has structs, with their shardings, of the quantized stack. If it is no quantized weight,
    w_L is returned.
    """
    if not is_quantized(like):
        return w_L
    placed = jax.tree.map(lambda s: s.sharding, like)
    # Without a current mesh the compiler divides the work by the shardings of the results.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return jax.jit(
            lambda w: jax.lax.map(functools.partial(quantize_like, like), w), out_shardings=placed
        )(w_L)


def dequantize(
    q: Quantized, dtype: DTypeLike, *, axes: sharding.Axes | None = None
) -> Float[Array, "..."]:
    """Return the weight [*in, *out] that `quantize` stored, computed in float32, as dtype.

    Under a mesh the weight is gathered, as `sharding.gathered` leaves it, with these logical axes
    (None: not split).
    """
    axes = axes or (None,) * (q.scales.ndim + (0 if isinstance(q, NF4) else q.inputs))
    return (_dequantize_nf4 if isinstance(q, NF4) else _dequantize_int8)(q, dtype, axes)


def is_quantized(x: Any) -> bool:
    """Return whether x is a quantized weight."""
    return isinstance(x, NF4 | Int8Rows)


def weight_in_use(param: nnx.Param, dtype: DTypeLike) -> Float[Array, "..."]:
    """Return a block's weight in the compute dtype: gathered, and dequantized.

    A quantized weight is gathered as it is stored, so that devices exchange 4 or 8 bits a weight.
    """
    value, axes = param.get_value(), param.get_metadata()["axes"]
    if not is_quantized(value):
        return sharding.gathered(value, *axes)
    here = jax.tree.map(lambda x, a: sharding.gathered(x, *a), value, value.axes_of(axes))
    return dequantize(here, dtype, axes=sharding.in_use(axes))


def cast_weights(tree: Any, dtype: DTypeLike) -> Any:
    """Cast the arrays of a tree of parameters; leave quantized weights as they are."""

    def cast(x):
        return x if is_quantized(x) else x.astype(dtype)

    return jax.tree.map(cast, tree, is_leaf=is_quantized)


@functools.cache
def scale_levels() -> np.ndarray:
    """Return the 256 levels of the 8-bit scales: a sign, an exponent of ten and a linear part.

    References:
      arXiv:2110.02861, section 2.2 (dynamic tree quantization).
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (exponent - 6)) * middles
        levels += [*magnitudes.tolist(), *(-magnitudes).tolist()]
    return np.sort(np.array(levels, np.float32))


def _linspace(count: int) -> np.ndarray:
    """Return float32 numbers from 0.1 to 1, rounded as torch.linspace rounds them on a CPU.

    torch counts from both ends with a fused multiply-add, which float64 stands for here.
    """
    low, high, i = np.float32(0.1), np.float32(1), np.arange(count)
    step = np.float64((high - low) / np.float32(count - 1))
    numbers = np.where(i < count // 2, low + step * i, high - step * i[::-1])
    return numbers.astype(np.float32)


def _quantize_nf4(w, inputs):
    last = w.shape[inputs - 1]
    if last % BLOCK:
        raise ValueError(f"an input axis of {last} must be a multiple of {BLOCK} for nf4")
    blocks = w.reshape(*w.shape[: inputs - 1], last // BLOCK, BLOCK, *w.shape[inputs:])
    absmax = jnp.max(jnp.abs(blocks), axis=inputs)
    inverse = 1 / jnp.maximum(absmax, 1e-38)
    levels = _nearest(jnp.clip(blocks * jnp.expand_dims(inverse, inputs), -1, 1), NF4_LEVELS)
    pairs = levels.reshape(*absmax.shape[:inputs], BLOCK // 2, 2, *w.shape[inputs:])
    high, low = jnp.moveaxis(pairs, inputs + 1, 0)
    offset = jnp.mean(absmax)
    centred = jnp.pad(_outputs_first(absmax - offset, inputs), (0, -absmax.size % SCALE_BLOCK))
    centred = centred.reshape(-1, SCALE_BLOCK)
    factors = jnp.max(jnp.abs(centred), axis=1)
    scaled = jnp.clip(centred * (1 / jnp.maximum(factors, 1e-38))[:, None], -1, 1)
    scales = _nearest(scaled, scale_levels()).reshape(-1)[: absmax.size]
    return NF4(
        codes=(high << 4) | low,
        scales=_inputs_first(scales, absmax.shape, inputs),
        factors=factors,
        offset=offset,
        inputs=inputs,
    )


def _dequantize_nf4(q, dtype, axes):
    n, shape = q.inputs, q.codes.shape
    # The place of each scale in the order in which `factors` counts them.
    place = _inputs_first(np.arange(math.prod(q.scales.shape)), q.scales.shape, n) // SCALE_BLOCK
    factors = sharding.take_rows(q.factors, place, *axes)
    absmax = sharding.take_rows(jnp.asarray(scale_levels()), q.scales, *axes) * factors + q.offset
    pairs = jnp.stack([q.codes >> 4, q.codes & 15], axis=n + 1)
    split = (*axes[:n], None, None, *axes[n:])
    levels = sharding.take_rows(jnp.asarray(NF4_LEVELS), pairs, *split)
    w = (levels * jnp.expand_dims(absmax, (n, n + 1))).astype(dtype)
    whole = (*shape[: n - 1], shape[n - 1] * BLOCK, *shape[n + 1 :])
    return sharding.reshape(w, whole, *axes)


def _quantize_int8(w, inputs):
    axes = tuple(range(inputs))
    scales = jnp.max(jnp.abs(w), axis=axes)
    factor = jnp.where(scales > 0, 127 / jnp.where(scales > 0, scales, 1), 0)
    codes = jnp.round(w * jnp.expand_dims(factor, axes)).astype(jnp.int8)
    return Int8Rows(codes=codes, scales=scales, inputs=inputs)


def _dequantize_int8(q, dtype, axes):
    del axes  # an elementwise product keeps the layout of its operands
    factor = jnp.expand_dims(q.scales * np.float32(1 / 127), tuple(range(q.inputs)))
    return (q.codes.astype(jnp.float32) * factor).astype(dtype)


def _nearest(x, levels):
    """Return the index of the nearest level, the lower one of two equally near."""
    middles = (levels[:-1] + levels[1:]) / np.float32(2)
    return jnp.searchsorted(jnp.asarray(middles), x, side="left").astype(jnp.uint8)


def _outputs_first(x, inputs):
    """Flatten [*in, *out] with the outputs as the slow axes, as a HF matrix [out, in] is stored."""
    return jnp.moveaxis(x, range(inputs), range(x.ndim - inputs, x.ndim)).reshape(-1)


def _inputs_first(flat, shape, inputs):
    """Undo `_outputs_first`."""
    moved = flat.reshape(*shape[inputs:], *shape[:inputs])
    return moved.transpose(*range(moved.ndim - inputs, moved.ndim), *range(moved.ndim - inputs))
