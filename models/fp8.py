"""Matrix products of a block in 8-bit floating point, with their gradients.

A GPU of compute capability 8.9 or higher multiplies 8-bit numbers twice as fast as bfloat16. The
embedding, the norms, attention, the output matrix and everything that is stored keep their dtypes.

Recipe:
  Dtypes. e4m3 (3 mantissa bits, at most 448) for activations and weights, e5m2 (2 mantissa bits, at
  most 57,344) for gradients of activations: the hybrid recipe of Micikevicius et al. The gradient
  of a weight is a product of both, returned in the compute dtype.
  Scales. One power of two per tensor, computed from the tensor itself. There is no history of
  earlier steps, so there is no state to store. Multiplying by a power of two is exact.
  Bounds. The maximum of a tensor costs a pass over it, before the pass that quantizes. The range of
  the 8-bit dtypes is wide (e4m3: 17 powers of two, e5m2: 32), so an upper bound that is 2^6 above
  the usual value costs no precision. Three tensors have an upper bound that needs no pass:
    the output of a norm: |x_i| <= sqrt(D) max |weight|;
    the gradients of gate and up in SwiGLU: by the Cauchy-Schwarz inequality an element of the
    gradient of the activation is at most the largest norm of a row of dy times that of a row of w2,
    and the slope of silu is at most 1.1. They are quantized in the pass that computes them.
  Layouts. On Hopper both operands of an 8-bit product must be contiguous in the summed dimension.
  Activations and their gradients are needed by rows for the product with a weight (which sums over
  channels), and by columns for the gradient of the weight (which sums over tokens).

A scale is NaN where the bound is not finite, and so is every product with that tensor: the guard of
the training step skips such a step, as it does in bfloat16.

B batch, T query pos, D embed, F ffn.

References:
  Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, DTypeLike, Float

from models import sharding

ACTIVATION, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
SLOPE_OF_SILU = 1.1
"""Upper bound of the slope of silu; its maximum is 1.0998."""

# The tensor cores of Hopper sum 8-bit products with about 14 bits. HIGHEST adds partial sums in
# float32: for gradients, as TransformerEngine does. Over 32,768 tokens the error of the sum is
# then 1e-4 instead of 3e-3 for numbers of both signs, and 4e-4 instead of 0.2 for numbers of one
# sign (measured on an H200).
_EXACT = jax.lax.Precision.HIGHEST


class Quantized(NamedTuple):
    """A tensor in 8 bits: values * scale.

    Attributes:
      values: e4m3 or e5m2.
      scale: float32 scalar, a power of two; NaN where the tensor is not finite.
    """

    values: Array
    scale: Float[Array, ""]


def largest(x: Array) -> Float[Array, ""]:
    """Return the largest magnitude of a tensor in float32, without a gradient.

    Every policy of `models.remat` saves it, so that no pass over the tensor is repeated. For a
    tensor with a NaN the result is NaN, or on a CPU the largest of the other elements.
    """
    maximum = jnp.max(jnp.abs(jax.lax.stop_gradient(x))).astype(jnp.float32)
    return checkpoint_name(maximum, "fp8_max")


def norm_bound(weight_D: Float[Array, " D"]) -> Float[Array, ""]:
    """Return an upper bound of the magnitude of `rms_norm`'s output: sqrt(D) max |weight|."""
    return np.sqrt(np.float32(weight_D.size)) * largest(weight_D)


def scale_of(bound: Float[Array, ""], dtype: DTypeLike) -> Float[Array, ""]:
    """Return the smallest power of two that scales a bound into the range of an 8-bit dtype.

    Args:
      bound: float32, upper bound of the magnitude of a tensor.
      dtype: e4m3 or e5m2.

    Returns:
      The scale s, with bound / s < 2^8 (e4m3) or 2^15 (e5m2) and s >= 2^-100. NaN for a bound that
      is infinite or NaN.
    """
    # A scaled bound is below the largest power of two of the dtype. The largest number is 1.75 x
    # as large: room for rounding errors in the tensor.
    top = math.frexp(float(jnp.finfo(dtype).max))[1] - 1
    # Computed from the exponent bits of float32: exact, and the same on every device.
    biased = jax.lax.bitcast_convert_type(bound, jnp.int32) >> 23
    biased = jnp.maximum(biased + 1 - top, 127 - 100)
    scale = jax.lax.bitcast_convert_type(biased << 23, jnp.float32)
    return jnp.where(jnp.isfinite(bound), scale, jnp.nan)


def quantize(x: Array, scale: Float[Array, ""], dtype: DTypeLike) -> Quantized:
    """Round x / scale to the nearest numbers of an 8-bit dtype.

    XLA writes the result by rows, and transposes the 8-bit array where a product needs columns. A
    single pass that writes both layouts ran at 30% of the memory bandwidth (1.8B at 32k, one H200).
    """
    return _materialize(_rounded(x, scale, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def products(
    x: Array, weights: tuple[Array, ...], bound: Float[Array, ""], out: sharding.Axes
) -> tuple[Array, ...]:
    """Multiply activations by weights in 8 bits; x is quantized once for all of them.

    The gradients are 8-bit products too. XLA removes that of a frozen weight, which nothing uses.

    Args:
      x: [B, T, ...]; all dimensions after T are summed over, and each weight begins with them.
      weights: in the dtype of x.
      bound: upper bound of |x|; has no gradient.
      out: logical axes of each result.

    Returns:
      For each weight [B, T, ...] in the dtype of x, with the last dimensions of the weight.
    """
    return _products_forward(x, weights, bound, out)[0]


def _products_forward(x, weights, bound, out):
    x_q = quantize(x, scale_of(bound, ACTIVATION), ACTIVATION)
    scales = tuple(map(_scale_of_weight, weights))
    ys = tuple(
        _times(x_q, _for_forward(w, scale), x.dtype, out)
        for w, scale in zip(weights, scales, strict=True)
    )
    # Otherwise XLA adds the residual stream inside the product, in place, to a copy of the stream.
    return _materialize(ys), (_as_bits(x_q), weights, scales)


def _products_backward(out, residuals, dys):
    x_bits, weights, scales = residuals
    x_q = _from_bits(x_bits)
    dxs, dws = [], []
    for w, scale, dy in zip(weights, scales, dys, strict=True):
        dy_q = quantize(dy, scale_of(largest(dy), GRADIENT), GRADIENT)
        w_q = quantize(w, scale, ACTIVATION)
        dxs.append(_times_transposed(dy_q, w_q, dy.dtype, like=x_q.values))
        dws.append(_sum_over_tokens(x_q, dy_q, like=w))
    return functools.reduce(operator.add, dxs), tuple(dws), None


products.defvjp(_products_forward, _products_backward)


def product(x: Array, w: Array, bound: Float[Array, ""], out: sharding.Axes) -> Array:
    """Multiply activations by one weight, see `products`."""
    return products(x, (w,), bound, out)[0]


@jax.custom_vjp
def swiglu(
    x_BTD: Float[Array, "B T D"],
    w1_DF: Float[Array, "D F"],
    w3_DF: Float[Array, "D F"],
    w2_FD: Float[Array, "F D"],
    bound: Float[Array, ""],
) -> Float[Array, "B T D"]:
    """Compute w2(silu(w1 x) * w3 x) with 8-bit products, three forward and six backward.

    x is quantized once for w1 and w3. The activation, and the gradients of gate and up, are written
    in 8 bits only. The weights have the dtype of x, the output of the norm; `bound`, an upper bound
    of |x|, has no gradient.
    """
    return _swiglu_forward(x_BTD, w1_DF, w3_DF, w2_FD, bound)[0]


def _swiglu_forward(x_BTD, w1_DF, w3_DF, w2_FD, bound):
    dtype, T = x_BTD.dtype, sharding.positions(x_BTD)
    stream, hidden = ("batch", T, None), ("batch", T, "ffn")
    x_q = quantize(x_BTD, scale_of(bound, ACTIVATION), ACTIVATION)
    weights = (w1_DF, w3_DF, w2_FD)
    scales = tuple(map(_scale_of_weight, weights))
    w1_q, w3_q, w2_q = map(_for_forward, weights, scales)

    gate_BTF, up_BTF = _times(x_q, w1_q, dtype, hidden), _times(x_q, w3_q, dtype, hidden)
    gate_BTF, up_BTF = checkpoint_name((gate_BTF, up_BTF), "gate_up")
    act_BTF = _silu_times(gate_BTF, up_BTF)
    act_scale = scale_of(largest(act_BTF), ACTIVATION)
    y_BTD = _times(quantize(act_BTF, act_scale, ACTIVATION), w2_q, dtype, stream)
    # Upper bounds of the derivatives of the activation by gate and by up.
    slopes = SLOPE_OF_SILU * largest(up_BTF), largest(gate_BTF)
    residuals = (_as_bits(x_q), weights, scales, gate_BTF, up_BTF, act_scale, slopes)
    return _materialize(y_BTD), residuals


def _swiglu_backward(residuals, dy_BTD):
    x_bits, weights, scales, gate_BTF, up_BTF, act_scale, slopes = residuals
    x_q = _from_bits(x_bits)
    w1_DF, w3_DF, w2_FD = weights
    w1_q, w3_q, w2_q = (quantize(w, s, ACTIVATION) for w, s in zip(weights, scales, strict=True))
    dtype = dy_BTD.dtype

    longest = _largest_norm(dy_BTD)  # of a token; an upper bound of its elements too
    dy_q = quantize(dy_BTD, scale_of(longest, GRADIENT), GRADIENT)
    dact_BTF = _times_transposed(dy_q, w2_q, dtype, like=gate_BTF)
    dgate_scale, dup_scale = (
        scale_of(longest * _largest_norm(w2_FD) * slope, GRADIENT) for slope in slopes
    )
    gate32_BTF, dact32_BTF = gate_BTF.astype(jnp.float32), dact_BTF.astype(jnp.float32)
    sigmoid_BTF = jax.nn.sigmoid(gate32_BTF)
    dgate_BTF = sigmoid_BTF * (1 + gate32_BTF * (1 - sigmoid_BTF)) * up_BTF * dact32_BTF
    dgate_q = quantize(dgate_BTF, dgate_scale, GRADIENT)
    dup_q = quantize(sigmoid_BTF * gate32_BTF * dact32_BTF, dup_scale, GRADIENT)
    act_q = quantize(_silu_times(gate_BTF, up_BTF), act_scale, ACTIVATION)

    dx_BTD = _times_transposed(dgate_q, w1_q, dtype, like=dy_BTD)
    dx_BTD += _times_transposed(dup_q, w3_q, dtype, like=dy_BTD)
    dw1_DF = _sum_over_tokens(x_q, dgate_q, like=w1_DF)
    dw3_DF = _sum_over_tokens(x_q, dup_q, like=w3_DF)
    dw2_FD = _sum_over_tokens(act_q, dy_q, like=w2_FD)
    return dx_BTD, dw1_DF, dw3_DF, dw2_FD, None


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _silu_times(gate_BTF, up_BTF):
    """Return silu(gate) * up in float32."""
    return jax.nn.silu(gate_BTF.astype(jnp.float32)) * up_BTF.astype(jnp.float32)


def _scale_of_weight(w):
    return scale_of(largest(w), ACTIVATION)


def _largest_norm(x):
    """Return the largest Euclidean norm of the rows of x (its last dimension)."""
    return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)))


def _rounded(x, scale, dtype):
    return Quantized((x.astype(jnp.float32) * (1 / scale)).astype(dtype), scale)


def _materialize(x):
    """Return x as an array that XLA does not fuse with the operations that follow."""
    return jax.lax.optimization_barrier(x)


def _for_forward(w, scale):
    """Quantize a weight for the forward pass; XLA transposes it in the same pass.

    Without the fixed layout XLA transposes the weight in 16 bits first, and keeps this copy of all
    layers for the backward pass (7 GiB at 7B).
    """
    rows = Layout(major_to_minor=tuple(range(w.ndim)))
    values, scale = _rounded(w, scale, ACTIVATION)
    return Quantized(with_layout_constraint(values, rows), scale)


def _as_bits(q):
    """Return an e4m3 tensor as integers, for the backward pass.

    jax rounds the floating-point numbers that remat saves to their own dtype, as if e4m3 had an
    infinity as IEEE dtypes have: numbers from 240 to 448 became NaN (jax 0.11.2, 0.12.0).
    """
    return jax.lax.bitcast_convert_type(q.values, jnp.uint8), q.scale


def _from_bits(bits):
    values, scale = bits
    return Quantized(jax.lax.bitcast_convert_type(values, ACTIVATION), scale)


def _times(x: Quantized, w: Quantized, dtype, out: sharding.Axes) -> Array:
    """Return x w, summed over all dimensions of x after T."""
    summed = x.values.ndim - 2
    return _dot(x, w, range(2, 2 + summed), range(summed), dtype, sharding.current_spec(out))


def _times_transposed(dy: Quantized, w: Quantized, dtype, like: Array) -> Array:
    """Return dy w^T, summed over all dimensions of dy after T, with the sharding of `like`."""
    summed = dy.values.ndim - 2
    of_w = range(w.values.ndim - summed, w.values.ndim)
    return _dot(dy, w, range(2, 2 + summed), of_w, dtype, _place(like), _EXACT)


def _sum_over_tokens(x: Quantized, dy: Quantized, like: Array) -> Array:
    """Return x^T dy, summed over B and T, with the dtype and the sharding of the weight `like`."""
    return _dot(x, dy, (0, 1), (0, 1), like.dtype, _place(like), _EXACT)


def _dot(a: Quantized, b: Quantized, of_a, of_b, dtype, place, precision=None) -> Array:
    out = jax.lax.dot_general(
        a.values,
        b.values,
        ((tuple(of_a), tuple(of_b)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=place,
    )
    # The factor is a power of two, exact in every dtype; XLA makes it an argument of the product.
    return out * (a.scale * b.scale).astype(dtype)


def _place(x):
    """Return the PartitionSpec of an array; None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec
