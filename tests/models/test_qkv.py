"""q, k and v out of the fused projection: values, and the gradient written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import PRESETS
from models.layers import rope_table, rotate
from models.qkv import split_qkv_and_rope

B, T, K, H = 2, 7, 2, 16


def _tables():
    positions_BT = jnp.asarray(np.random.default_rng(0).integers(0, 50, (B, T)), jnp.float32)
    angles = positions_BT[..., None, None] * jnp.linspace(0.1, 1, H // 2)[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def _plain(qkv_BTKgH, cos, sin):
    """Compute the same without a custom gradient."""
    q_BTNH = rotate(qkv_BTKgH[:, :, :, :-2].reshape(B, T, -1, H), cos, sin)
    return q_BTNH, rotate(qkv_BTKgH[:, :, :, -2], cos, sin), qkv_BTKgH[:, :, :, -1]


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_is_the_derived_one(group, dtype):
    """Each slot of the gradient comes from its own head, turned back, rounded once."""
    draw = np.random.default_rng(1).standard_normal
    qkv_BTKgH = jnp.asarray(draw((B, T, K, group + 2, H)), dtype)
    tables = _tables()
    out, back = jax.vjp(lambda x: split_qkv_and_rope(x, *tables), qkv_BTKgH)
    want, derived = jax.vjp(lambda x: _plain(x, *tables), qkv_BTKgH)
    for a, b in zip(out, want, strict=True):
        np.testing.assert_array_equal(a, b)

    gradients = tuple(jnp.asarray(draw(x.shape), dtype) for x in out)
    (got,), (expected,) = back(gradients), derived(gradients)
    assert got.dtype == dtype
    rtol = 1e-6 if dtype == jnp.float32 else 1e-2
    got, expected = (x.astype(jnp.float32) for x in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-6)


def test_turning_back_undoes_the_rotation():
    """A rotation is orthogonal: its gradient of its own result is what went in."""
    config = PRESETS["nano"]
    positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    cos, sin = rope_table(positions_BT, config)
    shape = (B, T, config.num_kv_heads, config.group_size + 2, config.head_dim)
    qkv_BTKgH = jnp.asarray(np.random.default_rng(2).standard_normal(shape), jnp.float32)
    out, back = jax.vjp(lambda x: split_qkv_and_rope(x, cos, sin), qkv_BTKgH)
    np.testing.assert_allclose(back(out)[0], qkv_BTKgH, atol=1e-6)
