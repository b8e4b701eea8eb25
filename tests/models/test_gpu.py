"""Parity of every attention implementation that runs on a Hopper GPU.

Run with `pytest -m gpu tests/models`; where beartype is not installed, add
`-o addopts=--import-mode=importlib`. The goldens' heads of 16 are too narrow for the kernels: those
are compared with eager in fp32, on models with heads of 128, and may err by `FACTOR` of what eager
itself errs in bf16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.config import ModelConfig
from models.execution import Execution
from models.generate import generate
from models.internlm2 import InternLM2, init
from models.weights.load import load_hf
from models.weights.table import table
from tests.models.test_internlm2 import GRAD, LOGITS, LOSS, hf_gradients, loss_of, segments_of

pytestmark = pytest.mark.gpu

FACTOR = 1.5
GROUPS = {2: (4, 2), 4: (4, 1), 6: (6, 1)}  # query heads to a kv head: heads of each


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Compile with optimizations: the tests here compare optimized programs."""


@pytest.fixture(autouse=True)
def standard_promotion():
    """jax.nn's attention and optax's AdamW promote types."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def config_of(group: int) -> ModelConfig:
    heads, kv_heads = GROUPS[group]
    return ModelConfig(
        vocab_size=320,
        hidden_size=128 * heads,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=512,
        initializer_range=0.05,
    )


def batch(seed: int, *, packed: bool, rows: int = 2, length: int = 512) -> dict:
    """Tokens, and documents of 1 to 200 tokens with padding at the end, or none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 320, (rows, length), dtype=np.int32)
    if not packed:
        return {"tokens": tokens, "segment_ids": None}
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        cuts = np.cumsum(rng.integers(1, 200, length))
        row[:] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
        row[length - 13 :] = 0
    return {"tokens": tokens, "segment_ids": segments}


def loss_and_logits(model, data):
    """Mean over targets inside of a document."""
    logits = model(data["tokens"], segment_ids=data["segment_ids"])
    labels = jnp.asarray(data["tokens"])
    if data["segment_ids"] is not None:
        ids = jnp.asarray(data["segment_ids"])
        ends = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)])
        labels = jnp.where(ends | (ids == 0), -100, labels)
    return loss_of(logits, labels), logits


@functools.cache
def weights(group: int) -> InternLM2:
    return init(config_of(group), seed=1)


def model_of(group: int, attn: str, dtype) -> InternLM2:
    """Return fp32 weights for any implementation and compute dtype."""
    model = jax.tree.map(lambda x: x, weights(group))
    model.execution = Execution(attn=attn, dtype=dtype)
    return model


@functools.cache
def run(group, packed, attn, dtype):
    """(logits of real tokens, loss, gradients), fp32."""
    model, data = model_of(group, attn, dtype), batch(group, packed=packed)
    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))(model, data)
    real = np.ones(data["tokens"].shape, bool)
    if data["segment_ids"] is not None:
        real = data["segment_ids"] > 0
    return np.asarray(logits)[real], float(loss), [np.asarray(g) for g in jax.tree.leaves(grads)]


def distance(a, b):
    return np.linalg.norm((a - b).astype(np.float64))


@pytest.mark.parametrize(
    ("attn", "packed", "group"),
    [
        ("pallas", True, 2),
        ("pallas", True, 4),
        ("pallas", True, 6),
        ("pallas", False, 2),
        ("cudnn", False, 2),
        ("cudnn", False, 6),
        ("xla", True, 2),
    ],
)
def test_bf16_is_as_near_to_fp32_as_eager_is(attn, packed, group):
    """Logits, loss and the gradient of every parameter; cudnn knows no documents."""
    with jax.default_matmul_precision("highest"):
        logits, loss, grads = run(group, packed, "eager", jnp.float32)
    theirs = run(group, packed, "eager", jnp.bfloat16)
    ours = run(group, packed, attn, jnp.bfloat16)
    assert distance(ours[0], logits) <= FACTOR * distance(theirs[0], logits)
    assert abs(ours[1] - loss) <= FACTOR * abs(theirs[1] - loss) + 1e-4 * loss
    assert len(grads) == len(table(config_of(group)))
    for ours_g, theirs_g, exact_g in zip(ours[2], theirs[2], grads, strict=True):
        assert np.isfinite(ours_g).all() and np.linalg.norm(exact_g) > 0
        assert distance(ours_g, exact_g) <= FACTOR * distance(theirs_g, exact_g)


@pytest.mark.parametrize("attn", ["eager", "xla"])
@pytest.mark.parametrize("case", ["basic", "packed"])
def test_logits_loss_and_gradients_of_the_original(tiny_dir, golden, exact, attn, case):
    """In fp32, within what the CPU is held to."""
    model = load_hf(tiny_dir, execution=Execution(dtype="float32", attn=attn))
    segments = segments_of(golden, case)

    def loss(model):
        logits = model(golden[f"{case}/input_ids"], segment_ids=segments)
        return loss_of(logits, golden[f"{case}/labels"]), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    np.testing.assert_allclose(logits, golden[f"{case}/logits"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(loss, golden[f"{case}/loss"], rtol=0, atol=LOSS)
    grads = hf_gradients(grads, model.config)
    names = [key for key in golden if key.startswith(f"{case}/grad/")]
    assert len(names) == 6
    for key in names:
        got = grads[key.removeprefix(f"{case}/grad/")]
        np.testing.assert_allclose(got, golden[key], err_msg=key, **GRAD)


def test_greedy_ids_are_the_originals(tiny_dir, golden, exact):
    """Through prefill, cache and decoding as the GPU's compiler makes them."""
    model = load_hf(tiny_dir, execution=Execution(dtype="float32", attn="xla"))
    prompts = [golden[f"generate{i}/prompt_ids"].tolist() for i in (0, 1)]
    want = [golden[f"generate{i}/new_ids"].tolist() for i in (0, 1)]
    assert generate(model, prompts, max_new_tokens=16) == want
    assert generate(model, prompts[:1], max_new_tokens=16) == want[:1]


@pytest.mark.parametrize("attn", ["pallas", "cudnn"])
def test_fifty_steps_train_as_eager_does(attn):
    """AdamW on the same batches, in bf16.

    Each step's loss is within 2% (of a loss of at least 0.25) of eager's in bf16, and on the mean
    as near to fp32's as twice eager's own distance: after some steps both wander off by chance.
    """
    packed = attn != "cudnn"
    runs = {
        (name, dtype): losses_of(name, dtype, packed=packed)
        for name, dtype in ((attn, jnp.bfloat16), ("eager", jnp.bfloat16), ("eager", jnp.float32))
    }
    ours, theirs, exact = runs.values()
    assert ours[-1] < 0.8 * ours[0]  # it does train
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.005)
    noise = np.abs(theirs - exact).mean()
    assert np.abs(ours - exact).mean() <= 2 * noise + 1e-3


def losses_of(attn, dtype, *, packed):
    tx = optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1)
    model = model_of(2, attn, dtype)

    @jax.jit
    def step(model, state, data):
        (loss, _), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(model, data)
        updates, state = tx.update(grads, state, model)
        return optax.apply_updates(model, updates), state, loss

    state, losses = tx.init(model), []
    batches = [batch(seed, packed=packed) for seed in range(4)]  # few: to be learned by heart
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        for i in range(50):
            model, state, loss = step(model, state, batches[i % 4])
            losses.append(float(loss))
    return np.array(losses)
