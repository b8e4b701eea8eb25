"""NF4 and int8 weights: levels, scales and values are those of bitsandbytes."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from models.quantize import BLOCK, NF4_LEVELS, dequantize, quantize, scale_levels


def weight(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32) * 0.02)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("shape", "inputs"), [((128, 3, 4, 8), 1), ((2, 64, 24), 2)])
def test_nf4_error_is_at_most_half_the_widest_gap(rng, shape, inputs):
    """Each weight is within half a gap of its block's scale, and of what 8-bit scales add."""
    w = weight(rng, *shape)
    got = np.asarray(dequantize(quantize(w, "nf4", inputs=inputs), jnp.float32))
    assert got.shape == shape
    gap = np.diff(NF4_LEVELS).max() / 2
    scale = np.abs(np.asarray(w)).max()
    assert np.abs(got - np.asarray(w)).max() < scale * (gap + 0.02)


def test_nf4_levels_survive(rng):
    """A weight made of levels times one scale comes back exactly: the scales' mean is exact."""
    codes = rng.integers(0, 16, (BLOCK, 5))
    codes[0] = 15
    w = jnp.asarray(NF4_LEVELS[codes]) * 0.5
    got = dequantize(quantize(w, "nf4", inputs=1), jnp.float32)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(w))


def test_zeros_stay_zeros():
    for kind in ("nf4", "int8"):
        w = jnp.zeros((64, 3))
        got = dequantize(quantize(w, kind, inputs=1), jnp.bfloat16)
        assert got.dtype == jnp.bfloat16 and not np.asarray(got, np.float32).any()


def test_int8_is_within_half_a_step(rng):
    w = np.asarray(weight(rng, 32, 4, 6))
    got = np.asarray(dequantize(quantize(jnp.asarray(w), "int8", inputs=1), jnp.float32))
    step = np.abs(w).max(axis=0) / 127
    assert (np.abs(got - w) <= step * 0.5001).all()


def test_blocks_must_divide_the_inputs(rng):
    with pytest.raises(ValueError, match="an input axis of 96 must be a multiple of 64 for nf4"):
        quantize(weight(rng, 96, 4), "nf4", inputs=1)


@pytest.mark.torch
@pytest.mark.parametrize(("shape", "inputs"), [((448, 3, 4, 16), 1), ((3, 128, 56), 2)])
def test_nf4_is_bitsandbytes(rng, shape, inputs):
    """Codes and factors are equal, and the same stored numbers give the same weights bit for bit.

    The 8-bit scales may differ by one level: bitsandbytes' CPU code finds a level through a coarse
    table, which for about 0.15% of the values is not the nearest level. Here it is the nearest.
    """
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(rng, *shape)
    q = quantize(w, "nf4", inputs=inputs)
    ins, outs = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    hf = np.asarray(w).reshape(ins, outs).T  # [out, in]
    theirs, state = functional.quantize_4bit(
        torch.tensor(hf), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    np.testing.assert_array_equal(NF4_LEVELS, state.code.numpy())
    np.testing.assert_array_equal(scale_levels(), state.state2.code.numpy())
    codes = np.asarray(q.codes).reshape(ins // 2, outs).T.reshape(-1)
    np.testing.assert_array_equal(codes, theirs.numpy().reshape(-1))
    np.testing.assert_allclose(float(q.offset), float(state.offset), rtol=1e-6)  # order of a sum
    np.testing.assert_allclose(np.asarray(q.factors), state.state2.absmax.numpy(), rtol=1e-5)
    scales = np.asarray(q.scales).reshape(ins // BLOCK, outs).T.reshape(-1).astype(int)
    apart = np.abs(scales - state.absmax.numpy().astype(int))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.005

    stored = np.asarray(state.absmax).reshape(outs, ins // BLOCK).T.reshape(q.scales.shape)
    same = dataclasses.replace(
        q,
        scales=jnp.asarray(stored),
        factors=jnp.asarray(state.state2.absmax.numpy()),
        offset=jnp.asarray(state.offset.numpy()),
    )
    got = np.asarray(dequantize(same, jnp.float32)).reshape(ins, outs).T
    np.testing.assert_array_equal(got, functional.dequantize_4bit(theirs, state).numpy())


@pytest.mark.torch
def test_int8_is_bitsandbytes(rng):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(rng, 64, 48).astype(jnp.float16)
    q = quantize(w, "int8", inputs=1)
    codes, scales, _ = functional.int8_vectorwise_quant(torch.tensor(np.asarray(w).T.copy()))
    np.testing.assert_array_equal(np.asarray(q.codes).T, codes.numpy())
    np.testing.assert_array_equal(np.asarray(q.scales), scales.numpy())
    want = functional.int8_vectorwise_dequant(codes, scales).numpy()
    got = np.asarray(dequantize(q, jnp.float32)).T
    np.testing.assert_allclose(got, want, rtol=2e-7)
