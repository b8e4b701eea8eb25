"""Fused linear cross-entropy over a large vocabulary, one chunk of positions at a time.

A row of 32,768 positions and 92,544 tokens has 12 GB of float32 logits. This loss materializes the
logits of at most `chunk_tokens` positions per device, forward and backward: the gradients of a
chunk are computed in the forward pass, together with its loss, so that the backward pass neither
stores nor recomputes logits.

B batch, T position, C position inside a chunk, D embed, V vocab. Shardings are read from the
arguments; the model chooses them.

References:
    "Liger Kernel", Hsu et al. 2024, section 3.2 (fused linear cross-entropy) for the idea of
    forming the gradient in the forward pass.
    "PaLM: Scaling Language Modeling with Pathways", Chowdhery et al. 2022, section 5 (z-loss).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

CHUNK_TOKENS = 2048
"""Positions per device whose logits exist at once: 0.76 GB of float32 at V = 92,544."""


def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    w_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Array, ""]:
    """Sum weight * -log softmax(x @ w)[target] over positions; see `cross_entropy_and_z`."""
    return cross_entropy_and_z(x_BTD, w_DV, targets_BT, weights_BT, chunk_tokens=chunk_tokens)[0]


def cross_entropy_and_z(
    x_BTD: Float[Array, "B T D"],
    w_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    train_w: bool = True,
    by_position: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "B T"] | None]:
    """Return the total loss (cross-entropy + z-loss) and its z-loss term, summed over positions.

    The total is the sum over positions of
    weight * (-log softmax(x @ w)[target] + z_loss * log(Z)^2), where Z is the denominator of the
    softmax. The second term keeps log(Z) near 0 and the logits small.

    The caller divides by the number of loss tokens of the whole step, over devices, rows and
    microbatches; a microbatch alone does not have that number.

    Args:
        x_BTD: final hidden states in the compute dtype; B and T may be sharded, D not.
        w_DV: output matrix, gathered over the axes that shard B and T; V may be sharded.
        targets_BT: token ids in [0, V).
        weights_BT: float32, 0 where there is no target. Not differentiated.
        z_loss: the second term's factor; 1e-4 in PaLM.
        train_w: compute the gradient of w; without, w is frozen and its gradient is zero.
        by_position: return the weighted cross-entropy of each position, too.
        chunk_tokens: positions per device and chunk.

    Returns:
        (total, z-loss term), float32 scalars, replicated; and losses_BT, float32, split as x, or
        None. Only the total is differentiated.

    Raises:
        ValueError: chunk_tokens is not positive.

    Memory:
        The logits of one chunk in float32 and their gradient in the dtype of x; when
        differentiated, also the gradient of w in float32.
    """
    if chunk_tokens < 1:
        raise ValueError(f"{chunk_tokens=} must be at least 1")
    local = functools.partial(_sums, chunk_tokens, z_loss, train_w, by_position)
    tokens, axes = _token_axes(x_BTD)
    if not axes:
        return local(x_BTD, w_DV, targets_BT, weights_BT)

    def on_each_device(x_BTD, w_DV, targets_BT, weights_BT):
        # Marking w as varying over devices puts the all-reduce of its gradient after the loop over
        # chunks, once, instead of into every iteration.
        w_DV = jax.lax.pcast(w_DV, axes, to="varying")
        *sums, losses_BT = local(x_BTD, w_DV, targets_BT, weights_BT)
        return *jax.lax.psum(sums, axes), losses_BT

    return jax.shard_map(
        on_each_device,
        in_specs=(tokens, P(), tokens, tokens),
        out_specs=(P(), P(), tokens),
        axis_names=set(axes),  # the axis that shards V stays with the compiler
    )(x_BTD, w_DV, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _sums(chunk_tokens, z_loss, train_w, by_position, x_BTD, w_DV, targets_BT, weights_BT):
    del train_w  # for the gradient alone

    def step(sums, chunk):
        x_BCD, targets_BC, weights_BC = chunk
        losses_BC, zs_BC, _ = _losses(z_loss, x_BCD, w_DV, targets_BC)
        losses = (losses_BC - zs_BC) * weights_BC if by_position else None
        return _add(sums, losses_BC, zs_BC, weights_BC), losses

    chunks = _split(chunk_tokens, x_BTD, targets_BT, weights_BT)
    sums, losses = jax.lax.scan(step, _zeros_like_sums(weights_BT), chunks)
    return *sums, _join(losses, weights_BT.shape)


def _forward(chunk_tokens, z_loss, train_w, by_position, x_BTD, w_DV, targets_BT, weights_BT):
    def step(carry, chunk):
        sums, dw_DV = carry
        x_BCD, targets_BC, weights_BC = chunk
        losses_BC, zs_BC, dlogits_BCV = _losses(z_loss, x_BCD, w_DV, targets_BC)
        dlogits_BCV = (dlogits_BCV * weights_BC[..., None]).astype(x_BCD.dtype)
        dx_BCD = jnp.einsum(
            "BCV,DV->BCD", dlogits_BCV, w_DV, out_sharding=jax.typeof(x_BCD).sharding
        )
        if train_w:
            dw_DV += jnp.einsum(
                "BCD,BCV->DV", x_BCD, dlogits_BCV, preferred_element_type=jnp.float32
            )
        losses = (losses_BC - zs_BC) * weights_BC if by_position else None
        return (_add(sums, losses_BC, zs_BC, weights_BC), dw_DV), (dx_BCD, losses)

    chunks = _split(chunk_tokens, x_BTD, targets_BT, weights_BT)
    dw_DV = jnp.zeros_like(w_DV, dtype=jnp.float32) if train_w else None
    start = (_zeros_like_sums(weights_BT), dw_DV)
    (sums, dw_DV), (dx_NBCD, losses) = jax.lax.scan(step, start, chunks)
    dx_BTD = _join(dx_NBCD, x_BTD.shape)
    values = *sums, _join(losses, weights_BT.shape)
    # The float32 sums are stored in the dtype of w: the gradient of every other weight leaves a
    # matrix product in the compute dtype, too.
    return values, (dx_BTD, None if dw_DV is None else dw_DV.astype(w_DV.dtype))


def _backward(chunk_tokens, z_loss, train_w, by_position, residuals, cotangents):
    dx_BTD, dw_DV = residuals
    g, *_ = cotangents  # the z-loss alone, and single positions, are for the log
    return (
        (dx_BTD.astype(jnp.float32) * g).astype(dx_BTD.dtype),
        (dw_DV.astype(jnp.float32) * g).astype(dw_DV.dtype) if train_w else None,
        None,
        None,
    )


_sums.defvjp(_forward, _backward)


def _losses(z_loss, x_BCD, w_DV, targets_BC):
    """Return losses, their z-loss term, and the gradient of the logits, all in float32.

    The gradient is softmax - onehot. With log(Z)^2, whose derivative is 2 log(Z) softmax, the
    gradient is (1 + 2 z_loss log(Z)) softmax - onehot.
    """
    logits_BCV = jnp.einsum("BCD,DV->BCV", x_BCD, w_DV, preferred_element_type=jnp.float32)
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    # A comparison with every id instead of a gather, because V may be sharded; XLA fuses it.
    ids_V = jax.lax.broadcasted_iota(
        targets_BC.dtype, logits_BCV.shape, 2, out_sharding=jax.typeof(logits_BCV).sharding
    )
    hit_BCV = ids_V == targets_BC[..., None]
    target_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0.0), axis=-1)
    softmax_BCV = jnp.exp(logits_BCV - lse_BC[..., None])
    losses_BC, zs_BC = lse_BC - target_BC, jnp.zeros_like(lse_BC)
    if z_loss:
        zs_BC = z_loss * lse_BC**2
        softmax_BCV *= 1 + 2 * z_loss * lse_BC[..., None]
    return losses_BC + zs_BC, zs_BC, softmax_BCV - hit_BCV.astype(jnp.float32)


def _add(sums, losses_BC, zs_BC, weights_BC):
    return sums[0] + jnp.sum(losses_BC * weights_BC), sums[1] + jnp.sum(zs_BC * weights_BC)


def _split(chunk_tokens, *arrays_BT):
    """Reshape [B, T, ...] -> [chunks, B, C, ...]; T is padded with zeros (weight 0)."""
    B, T = arrays_BT[0].shape[:2]
    C = min(T, max(1, chunk_tokens // B))
    n = -(-T // C)

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, n * C - T)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, n, C, *a.shape[2:]), 1, 0)

    return tuple(split(a) for a in arrays_BT)


def _join(a, shape):
    """Reshape [chunks, B, C, ...] -> [B, T, ...], the inverse of `_split`; None stays None."""
    B, T, *rest = shape
    return None if a is None else jnp.moveaxis(a, 0, 1).reshape(B, -1, *rest)[:, :T]


def _zeros_like_sums(weights_BT):
    """Return two float32 zeros that vary over the same mesh axes as sums of the weights."""
    zero = jnp.sum(jnp.zeros_like(weights_BT))
    return zero, zero


def _token_axes(x_BTD) -> tuple[P, tuple[str, ...]]:
    """Return the sharding of B and T, and the mesh axes in it."""
    tokens = P(*tuple(jax.typeof(x_BTD).sharding.spec)[:2])
    axes = tuple((entry,) if isinstance(entry, str) else entry or () for entry in tokens)
    return tokens, sum(axes, ())
