"""Layers other than attention: RMSNorm, rotary position embedding, SwiGLU.

B batch, T query pos, N heads, H head dim, D embed, F ffn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from models import fp8, sharding
from models.config import ModelConfig
from models.lora import NO_DROPOUT, DropoutKeys, LoRA, add_adapter, make_adapters
from models.quantize import weight_in_use


def rms_norm(
    x_BTD: Float[Array, "B T D"], weight_D: Float[Array, " D"], *, eps: float
) -> Float[Array, "B T D"]:
    """Compute RMSNorm: x / rms(x) * weight, in the dtype of x.

    The statistics and the division are fp32. The quotient is rounded to the dtype of x and then
    multiplied by the weight in that dtype, in the order of the original.

    References:
      Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; InternLM2 modeling_internlm2.py,
      InternLM2RMSNorm.forward.
    """
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_square_BT1 = jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True)
    scale_BT1 = checkpoint_name(jax.lax.rsqrt(mean_square_BT1 + eps), "norm_scale")
    normed_BTD = (x32_BTD * scale_BT1).astype(x_BTD.dtype)
    return normed_BTD * weight_D.astype(x_BTD.dtype)[None, None]


def rope_table(
    positions_BT: Int[Array, "B T"],
    config: ModelConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Compute cosines and sines of the rotary angles (RoPE), fp32, for all layers at once.

    none:    angle = position * theta^(-2j/H), j = 0 .. H/2 - 1.
    linear:  the position is divided by factor, at every length.
    dynamic: for a document of length n > M = max_position_embeddings, theta becomes
             theta * (factor * n / M - (factor - 1))^(H / (H - 2)); up to M it is plain.

    n belongs to each document: 1 + the largest position in its run of equal segment ids, or in
    the whole row without segment ids. The original takes one n for the whole batch (the padded
    length or the largest position, depending on the version of its code), so that a long row
    changes the results of the other rows. Here the result of a document does not depend on the
    documents that it is packed or batched with. Both agree if no document is longer than M. In
    cached decoding n counts the tokens so far, and cached keys keep the base with which they were
    computed, as in the original.

    Args:
      positions_BT: position of each token in its document, from 0.
      config: head_dim, rope_theta, rope_scaling and max_position_embeddings are read.
      segment_ids: a document is a run of equal ids; None: one document a row.

    Returns:
      (cos, sin), each [B, T, 1, H/2]. Under a mesh T is split over seq, of the arguments it is not.

    References:
      Su et al. 2021, arXiv:2104.09864, eq. 34; dynamic NTK: InternLM2 modeling_internlm2.py,
      InternLM2DynamicNTKScalingRotaryEmbedding.
    """
    H, M, scaling = config.head_dim, config.max_position_embeddings, config.rope_scaling
    exponents = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    # The same operations as the original, in its order and precision: one ulp here is a visible
    # angle at position 32,768.
    frequencies = 1 / np.float32(config.rope_theta) ** exponents
    T = sharding.positions(positions_BT)
    positions = sharding.constrain(positions_BT, "batch", T).astype(jnp.float32)[..., None]
    if scaling is not None and scaling.type == "linear":
        positions = positions / scaling.factor
    angles = positions * frequencies[None, None]
    if scaling is not None and scaling.type == "dynamic":
        n = sharding.constrain(document_lengths(positions_BT, segment_ids), "batch", T)[..., None]
        growth = scaling.factor * jnp.maximum(n, M).astype(jnp.float32) / M - (scaling.factor - 1)
        base = config.rope_theta * growth ** (H / (H - 2))
        angles = jnp.where(n > M, positions / base ** exponents[None, None], angles)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x_j, x_{j + H/2}) by their angles (the half-split layout of HF).

    The rotation is fp32 and its result is rounded once. (The original first rounds cos and sin to
    the dtype of the model, which in bf16 leaves 8 bits of the cosine.)
    """
    low, high = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def document_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Compute the position of each token in its document (a run of equal ids), from 0."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    return index - jax.lax.cummax(jnp.where(_starts(segment_ids), index, 0), axis=1)


def document_lengths(
    positions_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """Compute 1 + the largest position in each token's document, or row without segment ids."""
    if segment_ids is None:
        longest = positions_BT.max(axis=1, keepdims=True)
        return jnp.broadcast_to(longest + 1, positions_BT.shape)
    starts_BT = _starts(segment_ids)
    # The maximum over each run, in two scans that restart at every run: from the start of the run
    # to the token, and from the token to the end of the run.
    ends_BT = jnp.pad(starts_BT[:, 1:], [(0, 0), (0, 1)], constant_values=True)
    before_BT = _running_max(starts_BT, positions_BT, reverse=False)
    after_BT = _running_max(ends_BT, positions_BT, reverse=True)
    return jnp.maximum(before_BT, after_BT) + 1


class SwiGLU(nnx.Module):
    """Feed-forward layer w2(silu(w1 x) * w3 x), without biases.

    References:
      Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype=jnp.float32,
        lora: LoRA | None = None,
    ):
        D, F, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.w1_DF = normal(rngs, (D, F), ("embed", "ffn"), std, param_dtype)
        self.w3_DF = normal(rngs, (D, F), ("embed", "ffn"), std, param_dtype)
        self.w2_FD = normal(rngs, (F, D), ("ffn", "embed"), std, param_dtype)
        up, down = ((D, F), ("embed", "ffn"), 1), ((F, D), ("ffn", "embed"), 1)
        self.lora = make_adapters(lora, {"w1": up, "w3": up, "w2": down}, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        dropout: DropoutKeys = NO_DROPOUT,
        bound: Float[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Apply the layer, in the dtype of x; the weights must have this dtype, or be quantized.

        `bound` is an upper bound of |x| for fp8 products (`models.fp8`); None: products in the
        dtype of x.
        """
        w1_DF = weight_in_use(self.w1_DF, x_BTD.dtype)
        w3_DF = weight_in_use(self.w3_DF, x_BTD.dtype)
        w2_FD = weight_in_use(self.w2_FD, x_BTD.dtype)
        if bound is not None and not self.lora:
            return fp8.swiglu(x_BTD, w1_DF, w3_DF, w2_FD, bound)
        add = functools.partial(add_adapter, self.lora, dropout=dropout)
        T = sharding.positions(x_BTD)
        stream, hidden = ("batch", T, None), ("batch", T, "ffn")
        if bound is None:
            gate_BTF = sharding.einsum("BTD,DF->BTF", x_BTD, w1_DF, out=hidden)
            up_BTF = sharding.einsum("BTD,DF->BTF", x_BTD, w3_DF, out=hidden)
        else:
            gate_BTF, up_BTF = fp8.products(x_BTD, (w1_DF, w3_DF), bound, hidden)
        gate_BTF = add("w1", gate_BTF, "BTD,DF->BTF", x_BTD, x_axes=stream, out=hidden)
        up_BTF = add("w3", up_BTF, "BTD,DF->BTF", x_BTD, x_axes=stream, out=hidden)
        gate_BTF, up_BTF = checkpoint_name((gate_BTF, up_BTF), "gate_up")
        x_BTF = jax.nn.silu(gate_BTF) * up_BTF
        if bound is None:
            y_BTD = sharding.einsum("BTF,FD->BTD", x_BTF, w2_FD, out=stream)
        else:
            y_BTD = fp8.product(x_BTF, w2_FD, fp8.largest(x_BTF), stream)
        return add("w2", y_BTD, "BTF,FD->BTD", x_BTF, x_axes=hidden, out=stream)


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: sharding.Axes, std: float, dtype
) -> nnx.Param:
    """Create a parameter from N(0, std), with the logical axes that it is sharded by."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: sharding.Axes, dtype) -> nnx.Param:
    """Create a parameter with one initial value: 1 for norms, 0 for biases."""
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


def _starts(segment_ids):
    """Mark the first token of each run of equal ids."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changes, [(0, 0), (1, 0)], constant_values=True)


def _running_max(resets_BT, values_BT, *, reverse):
    """Compute the running maximum along each row, restarted where resets_BT is true."""

    def combine(left, right):
        (reset_l, value_l), (reset_r, value_r) = left, right
        return reset_l | reset_r, jnp.where(reset_r, value_r, jnp.maximum(value_l, value_r))

    return jax.lax.associative_scan(combine, (resets_BT, values_BT), reverse=reverse, axis=1)[1]
