"""The chunked loss is the dense one, in value and gradients, on one device and on a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from train.config.sections import MeshConfig
from train.distributed.mesh import AXES, make_mesh
from train.step.loss import cross_entropy, cross_entropy_and_z

pytestmark = pytest.mark.usefixtures("compile_quickly")

B, T, D, V = 8, 14, 16, 24


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = jax.random.normal(keys[0], (B, T, D), dtype)
    w_DV = jax.random.normal(keys[1], (D, V), dtype)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = jax.random.bernoulli(keys[3], 0.7, (B, T)).astype(jnp.float32)
    return x_BTD, w_DV, targets_BT, weights_BT


@jax.jit
def dense(x_BTD, w_DV, targets_BT, weights_BT):
    """Compute the loss by its definition, with all logits at once in float32."""
    logits_BTV = jnp.einsum("BTD,DV->BTV", x_BTD.astype(jnp.float32), w_DV.astype(jnp.float32))
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    picked_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked_BT * weights_BT)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 40, 10_000])
def test_equals_the_dense_loss(chunk_tokens):
    """Any chunk length gives the same, also one that does not divide T or exceeds T."""
    x, w, targets, weights = inputs()

    def chunked(x, w):
        return cross_entropy(x, w, targets, weights, chunk_tokens=chunk_tokens)

    got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, w)
    want = jax.value_and_grad(dense, (0, 1))(x, w, targets, weights)
    # float32 sums of ~70 terms in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
    np.testing.assert_allclose(chunked(x, w), want[0], rtol=1e-6)  # without differentiation


@pytest.mark.parametrize("z_loss", [1e-4, 0.3])
@pytest.mark.parametrize("chunk_tokens", [8, 10_000])
def test_z_loss_equals_its_definition(z_loss, chunk_tokens):
    """Value and gradients against autodiff of the formula; its part is what it adds."""
    x, w, targets, weights = inputs()

    def naive(x, w):
        log_z_BT = jax.nn.logsumexp(jnp.einsum("BTD,DV->BTV", x, w), axis=-1)
        return dense(x, w, targets, weights) + z_loss * jnp.sum(log_z_BT**2 * weights)

    def chunked(x, w):
        total, z, losses = cross_entropy_and_z(
            *(x, w, targets, weights), z_loss=z_loss, chunk_tokens=chunk_tokens, by_position=True
        )
        return total, (z, losses)

    grad = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))
    (total, (z, losses)), grads = grad(x, w)
    want, want_grads = jax.jit(jax.value_and_grad(naive, (0, 1)))(x, w)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    np.testing.assert_allclose(total - z, dense(x, w, targets, weights), rtol=1e-6)
    undifferentiated, (_, again) = chunked(x, w)
    np.testing.assert_allclose(undifferentiated, want, rtol=1e-6)
    np.testing.assert_allclose(losses, again, rtol=1e-5, atol=1e-6)
    for b, t in np.ndindex(losses.shape):
        only = np.zeros_like(weights)
        only[b, t] = weights[b, t]
        if t % 5 == 0:
            one = dense(x, w, targets, only)
            np.testing.assert_allclose(losses[b, t], one, rtol=1e-4, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), grads, want_grads
    )


def test_bf16_inputs_sum_in_float32():
    """bf16 inputs cost the rounding of the gradients' operands (2^-8), not of the sum."""
    x, w, targets, weights = inputs(jnp.bfloat16)
    got = jax.value_and_grad(cross_entropy, (0, 1))(x, w, targets, weights)
    want = jax.value_and_grad(dense, (0, 1))(x, w, targets, weights)
    assert got[0].dtype == jnp.float32
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[1], want[1], strict=True):
        assert a.dtype == jnp.bfloat16
        scale = float(jnp.max(jnp.abs(b.astype(jnp.float32))))
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=2**-6, atol=2**-7 * scale
        )


def test_positions_without_weight_leave_no_trace():
    """Weight 0: neither value nor gradient, whatever the target."""
    x, w, targets, weights = inputs()
    weights = weights.at[:, 5].set(0)
    loss, dx = jax.value_and_grad(cross_entropy)(x, w, targets, weights)
    assert not dx[:, 5].any() and dx[:, 4].any()
    assert loss == cross_entropy(x, w, targets.at[:, 5].set(V - 1), weights)


def test_gradient_scales_with_what_follows():
    x, w, targets, weights = inputs()
    one = jax.grad(cross_entropy)(x, w, targets, weights)
    half = jax.grad(lambda x: cross_entropy(x, w, targets, weights) / 2)(x)
    np.testing.assert_array_equal(one / 2, half)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 4, 1, 2), (1, 2, 2, 2), (1, 1, 1, 8)])
def test_mesh_equals_one_device(sizes):
    """Rows over data and fsdp, T over seq, vocabulary over tensor: same loss and gradients."""
    x, w, targets, weights = inputs()
    want = jax.value_and_grad(dense, (0, 1))(x, w, targets, weights)
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    split = [a for a in AXES if mesh.shape[a] > 1]
    rows = P(
        tuple(a for a in split if a in ("data", "fsdp")) or None, "seq" if "seq" in split else None
    )
    columns = P(None, "tensor" if "tensor" in split else None)
    with jax.set_mesh(mesh):
        x, targets, weights = (jax.device_put(a, rows) for a in (x, targets, weights))
        w = jax.device_put(w, columns)

        def chunked(x, w):
            return cross_entropy(x, w, targets, weights, chunk_tokens=5)

        got = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, w)
    assert got[1][0].sharding.spec[:2] == tuple(rows) and got[1][1].sharding == w.sharding
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=2e-5, atol=2e-5), got, want
    )


def test_logits_of_a_row_never_exist():
    """No array of the differentiated program is as large as the logits of a row."""
    x, w, targets, weights = inputs()
    x, targets, weights = (
        jnp.tile(a, (1, 40) + (1,) * (a.ndim - 2)) for a in (x, targets, weights)
    )

    def chunked(x, w):
        return cross_entropy(x, w, targets, weights, chunk_tokens=16)

    text = jax.jit(jax.grad(chunked, (0, 1))).lower(x, w).compile().as_text()
    shapes = [s for line in text.splitlines() for s in _shapes(line)]
    largest = max(int(np.prod(s)) for s in shapes if V in s)
    assert largest < 40 * T * V


def _shapes(line: str):
    return [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", line)]


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        cross_entropy(*inputs(), chunk_tokens=0)
