"""Cached decoding equals the full pass, and the original's cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.cache import decode, prefill
from models.config import RopeScaling
from models.execution import Execution
from models.weights.load import load_hf

ATOL = 1e-4  # fp32, as the goldens' README suggests


@pytest.fixture(scope="module")
def model(tiny_dir):
    return load_hf(tiny_dir, execution=Execution(dtype="float32", attn="xla"))


@pytest.fixture(scope="module")
def step():
    return jax.jit(decode, donate_argnames="cache")


def read(model, step, tokens, prompt, filled=None):
    """Logits after the prompt and after each further token, [B, 1 + T - prompt, V]."""
    filled = np.ones_like(tokens) if filled is None else filled
    run = jax.jit(prefill, static_argnames="capacity")
    logits, cache = run(model, tokens[:, :prompt], filled[:, :prompt], capacity=tokens.shape[1] + 3)
    collected = [logits]
    for i in range(prompt, tokens.shape[1]):
        logits, cache = step(model, cache, tokens[:, i])
        collected.append(logits)
    return np.stack(collected, axis=1), cache


def test_decoding_step_by_step_is_the_originals(model, step, golden, exact):
    """The golden was fed in chunks through the cache; and the cache holds what its own held."""
    tokens = golden["basic/input_ids"]
    logits, cache = read(model, step, tokens, 17)
    np.testing.assert_allclose(logits[:1], golden["chunked/logits"][:, 16:], atol=ATOL, rtol=0)
    np.testing.assert_allclose(logits, golden["basic/logits"][:, 16:], atol=ATOL, rtol=0)
    for ours, name in ((cache.k_BKSH, "cache_k"), (cache.v_BKSH, "cache_v")):
        ours = np.stack(ours)[:, :, :, :40]
        np.testing.assert_allclose(ours, golden[f"basic/{name}"], atol=ATOL, rtol=0)
    assert cache.used == 40 and cache.lengths_B.tolist() == [40, 40]


def test_left_padding_changes_nothing(model, step, golden, exact):
    """Prompts of different lengths in one batch: the golden's left-padded rows."""
    tokens, real = golden["padded_left/input_ids"], golden["padded_left/attention_mask"]
    logits, _ = read(model, step, tokens, 20, real)
    np.testing.assert_allclose(logits, golden["padded_left/logits"][:, 19:], atol=ATOL, rtol=0)


def test_beyond_max_position_each_step_uses_its_own_base(model, step, exact):
    """A prompt that is long from the start agrees with the full pass; one that grows does not."""
    long = jax.tree.map(lambda x: x, model)
    long.config = dataclasses.replace(
        model.config,
        max_position_embeddings=16,
        rope_scaling=RopeScaling(type="dynamic", factor=2.0),
    )
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (1, 24), 3, 500))
    full = jax.jit(lambda model, tokens: model(tokens))(long, tokens)[:, -1]
    whole, _ = read(long, step, tokens, 24)
    np.testing.assert_allclose(whole[:, -1], full, atol=ATOL, rtol=0)
    # Keys written at 16 .. 22 keep their smaller bases, so stepping there differs: as documented.
    stepped, _ = read(long, step, tokens, 16)
    assert np.abs(stepped[:, -1] - full).max() > 0.01


def test_a_cache_below_the_prompt_is_refused(model):
    tokens = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="capacity=4 must be at least the 8 slots"):
        prefill(model, tokens, tokens, capacity=4)
