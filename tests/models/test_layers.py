"""RMSNorm's order of casts, the rules of rotary embedding, SwiGLU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import PRESETS, RopeScaling
from models.layers import SwiGLU, document_positions, rms_norm, rotate
from models.layers import document_lengths as eager_document_lengths
from models.layers import rope_table as eager_rope_table

# Operation by operation they would compile for longer than they run.
document_lengths = jax.jit(eager_document_lengths)
rope_table = jax.jit(eager_rope_table, static_argnames="config")

CONFIG = dataclasses.replace(PRESETS["nano"], rope_scaling=None, max_position_embeddings=64)
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0], [7, 7, 7, 7, 7, 7, 7, 7]])


def scaled(kind, factor):
    return dataclasses.replace(CONFIG, rope_scaling=RopeScaling(type=kind, factor=factor))


def angles(positions, config, segment_ids=None):
    """Angles in float64 from the formulas, one document length per token."""
    H, M, scaling = config.head_dim, config.max_position_embeddings, config.rope_scaling
    positions = np.asarray(positions, np.float64)
    n = np.asarray(document_lengths(jnp.asarray(positions, jnp.int32), segment_ids), np.float64)
    base = np.full_like(n, config.rope_theta)
    if scaling and scaling.type == "dynamic":
        s = scaling.factor
        base = np.where(n > M, base * (s * n / M - (s - 1)) ** (H / (H - 2)), base)
    if scaling and scaling.type == "linear":
        positions = positions / scaling.factor
    return positions[..., None] * base[..., None] ** (-np.arange(0, H, 2) / H)


def test_rms_norm_rounds_before_it_multiplies_the_weight():
    """The original's order: in bf16 the other order gives other bits."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 64), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (64,), jnp.bfloat16)
    x32 = np.asarray(x, np.float32)
    normed = x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-5)
    rounded = jnp.asarray(normed).astype(jnp.bfloat16) * w[None, None]
    late = (jnp.asarray(normed) * w.astype(jnp.float32)[None, None]).astype(jnp.bfloat16)
    got = rms_norm(x, w, eps=1e-5)
    assert got.dtype == jnp.bfloat16
    # A rare last bit may differ where numpy's and XLA's square roots straddle a rounding.
    assert np.mean(np.asarray(got != rounded)) < 0.01 < np.mean(np.asarray(got != late))


@pytest.mark.parametrize("length", [64, 65, 4096])
@pytest.mark.parametrize("config", [CONFIG, scaled("linear", 4.0), scaled("dynamic", 2.0)])
def test_rope_angles_follow_the_formulas(config, length):
    positions = jnp.arange(length)[None]
    cos, sin = rope_table(positions, config)
    assert cos.dtype == jnp.float32 and cos.shape == (1, length, 1, config.head_dim // 2)
    want = angles(positions, config)
    # fp32 angles: relative rounding 1e-7 of up to `length` radians.
    np.testing.assert_allclose(cos[:, :, 0], np.cos(want), rtol=0, atol=3e-7 * length + 1e-6)
    np.testing.assert_allclose(sin[:, :, 0], np.sin(want), rtol=0, atol=3e-7 * length + 1e-6)


def test_dynamic_scaling_has_no_effect_up_to_max_position():
    positions = jnp.arange(64)[None]
    for plain, dynamic in zip(
        rope_table(positions, CONFIG), rope_table(positions, scaled("dynamic", 3.0)), strict=True
    ):
        np.testing.assert_array_equal(plain, dynamic)


def test_dynamic_scaling_is_a_matter_of_each_document():
    """A long document changes nothing for the short one packed or batched beside it."""
    config = scaled("dynamic", 2.0)
    segments = jnp.concatenate([jnp.full((1, 40), 1), jnp.full((1, 100), 2)], axis=1)
    cos, _ = rope_table(document_positions(segments), config, segment_ids=segments)
    alone_short, _ = rope_table(jnp.arange(40)[None], config)
    alone_long, _ = rope_table(jnp.arange(100)[None], config)
    np.testing.assert_array_equal(cos[:, :40], alone_short)
    np.testing.assert_array_equal(cos[:, 40:], alone_long)
    assert np.abs(alone_long[:, :40] - alone_short).max() > 0.1

    rows = jnp.stack([jnp.arange(100), jnp.minimum(jnp.arange(100), 39)])
    batched, _ = rope_table(rows, config)
    np.testing.assert_array_equal(batched[1, :40], alone_short[0])


def test_rotate_turns_half_split_pairs():
    """As rotate_half in the original: q * cos + cat(-q2, q1) * sin."""
    q = jax.random.normal(jax.random.key(0), (1, 8, 2, 64))
    cos, sin = rope_table(jnp.arange(8)[None], CONFIG)
    q1, q2 = jnp.split(q, 2, axis=-1)
    both = [jnp.concatenate([x, x], axis=-1) for x in (cos, sin)]
    want = q * both[0] + jnp.concatenate([-q2, q1], axis=-1) * both[1]
    np.testing.assert_allclose(rotate(q, cos, sin), want, atol=1e-6)
    assert rotate(q.astype(jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_document_positions_restart_at_every_run():
    want = [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert document_positions(SEGMENTS).tolist() == want


def test_document_lengths_count_each_run():
    lengths = document_lengths(document_positions(SEGMENTS), SEGMENTS)
    assert lengths.tolist() == [[3, 3, 3, 2, 2, 3, 3, 3], [8] * 8]
    # A document cut in the middle: its positions, not its tokens, say how long it is.
    assert document_lengths(jnp.array([[5, 6, 0, 1]]), jnp.array([[1, 1, 2, 2]])).tolist() == [
        [7, 7, 2, 2]
    ]
    assert document_lengths(jnp.array([[0, 9, 1]]), None).tolist() == [[10, 10, 10]]


def test_swiglu_is_its_formula():
    ffn = SwiGLU(CONFIG, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, CONFIG.hidden_size))
    gate, up = x @ ffn.w1_DF[...], x @ ffn.w3_DF[...]
    want = (gate / (1 + jnp.exp(-gate)) * up) @ ffn.w2_FD[...]
    np.testing.assert_allclose(ffn(x), want, atol=1e-5)
