"""One step is the same step however its rows are cut up: into microbatches, over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.internlm2 import InternLM2, init
from train.config import MeshConfig, OptimConfig
from train.mesh import make_mesh
from train.optim import optimizer, schedule
from train.state import abstract_state, new_state, params_of
from train.step import batch_struct, compile_step, make_step, put_batch

OPTIM = OptimConfig(warmup=0.0, min_lr_ratio=1.0)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def set_up(model, mesh, tx=None, attn="xla"):
    """State and uncompiled step in float32."""
    tx = optimizer(OPTIM, 1e-2, 10) if tx is None else tx

    def make():
        return InternLM2(model, rngs=nnx.Rngs(params=0), attn=attn, dtype=jnp.float32)

    graphdef, like = abstract_state(make, tx, mesh)
    state = new_state(params_of(init(model, mesh=mesh), like), tx, like)
    return state, make_step(graphdef, tx, schedule(OPTIM, 1e-2, 10))


def two_steps(model, rows, *, mesh, accum=1, attn="xla"):
    """Metrics of two steps and the parameters after them, as numpy."""
    state, step = set_up(model, mesh, attn=attn)
    batch = put_batch(rows, accum=accum, mesh=mesh)
    compiled = compile_step(step, state, batch)
    state, first = compiled(state, batch)
    state, second = compiled(state, batch)
    return jax.tree.map(np.asarray, (first, second, state.params))


@pytest.fixture(scope="module")
def reference(tiny, packed_rows):
    """8 rows in one microbatch on one device."""
    return two_steps(tiny, packed_rows, mesh=one_device())


@pytest.mark.parametrize("accum", [2, 4, 8])
def test_accumulation_changes_nothing(tiny, packed_rows, reference, accum):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1, though microbatches have unequal numbers of targets."""
    got = two_steps(tiny, packed_rows, mesh=one_device(), accum=accum)
    for ours, theirs in zip(got[:2], reference[:2], strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-6)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)
        assert ours["loss_tokens"] == theirs["loss_tokens"]
    _close(got[2], reference[2])


@pytest.mark.parametrize(
    ("sizes", "accum", "attn"),
    [
        ((8, 1, 1), 1, "xla"),
        ((1, 8, 1), 1, "eager"),
        ((1, 4, 2), 2, "xla"),
        ((2, 2, 2), 1, "eager"),
    ],
)
def test_eight_devices_equal_one(tiny, packed_rows, reference, sizes, accum, attn):
    data, fsdp, tensor = sizes
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    got = two_steps(tiny, packed_rows, mesh=mesh, accum=accum, attn=attn)
    for ours, theirs in zip(got[:2], reference[:2], strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)
    _close(got[2], reference[2])


def test_loss_is_the_mean_over_targets(tiny, packed_rows, reference):
    """Against the model's own logits, and the counts against the rows."""
    model = init(tiny, dtype=jnp.float32, attn="eager")
    rows = jax.tree.map(jnp.asarray, packed_rows)
    logits_BTV = model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows.targets)
    want = jnp.sum(losses_BT * rows.loss_mask) / jnp.sum(rows.loss_mask)
    np.testing.assert_allclose(reference[0]["loss"], want, rtol=1e-5)
    assert reference[0]["loss_tokens"] == packed_rows.loss_mask.sum()
    assert reference[0]["tokens"] == (packed_rows.segment_ids > 0).sum()
    assert reference[1]["loss"] < reference[0]["loss"]


def test_rows_of_one_document_need_no_ids(tiny, packed_rows):
    """segment_ids of None and of all ones are the same step."""
    ones = packed_rows._replace(segment_ids=np.ones_like(packed_rows.segment_ids))
    with_ids = two_steps(tiny, ones, mesh=one_device())
    without = two_steps(tiny, ones._replace(segment_ids=None), mesh=one_device())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), without[0], with_ids[0])


def test_batch_without_targets_is_no_nan(tiny, packed_rows):
    empty = packed_rows._replace(loss_mask=np.zeros_like(packed_rows.loss_mask))
    first, _, params = two_steps(tiny, empty, mesh=one_device())
    assert first["loss"] == first["grad_norm"] == first["loss_tokens"] == 0
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))


def test_state_is_donated_and_keeps_its_place(tiny, packed_rows):
    """No second copy of weights and moments; every array stays sharded as it was."""
    mesh = make_mesh(MeshConfig(tensor=2))
    state, step = set_up(tiny, mesh)
    batch = put_batch(packed_rows, accum=1, mesh=mesh)
    compiled = compile_step(step, state, batch_struct(rows=8, seq_len=24, accum=1, mesh=mesh))
    held = sum(a.nbytes for a in jax.tree.leaves(_local(state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * held
    where = jax.tree.map(lambda a: a.sharding, state)
    after, _ = compiled(state, batch)
    assert all(a.is_deleted() for a in jax.tree.leaves(state))
    assert jax.tree.map(lambda a: a.sharding, after) == where


def _close(params, want):
    """Two Adam steps: an update is lr * g / |g| near g = 0, where rounding decides its sign."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), params, want)


def _local(state):
    return jax.tree.map(lambda a: a.addressable_shards[0].data, state)
