"""One step is the same step however its rows are cut up: into microbatches, over devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.execution import Execution
from models.internlm2 import InternLM2
from train.checkpoint.checkpoints import Checkpoints
from train.config.sections import MeshConfig, OptimConfig
from train.distributed.mesh import AXES, make_mesh
from train.step.lr_schedule import schedule
from train.step.optim import optimizer
from train.step.state import abstract_state, new_state, params_of
from train.step.step import batch_struct, compile_step, make_step, put_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")

OPTIM = OptimConfig(warmup_ratio=0.0, min_lr_ratio=1.0)
ONE = (1, 1, 1, 1)
SEQ_4, SEQ_2 = (1, 2, 4, 1), (2, 1, 2, 2)


class Trainer:
    """Compiles each way to cut up the 8 rows once, and trains from the same weights every time."""

    def __init__(self, model: InternLM2, rows, matmul="bf16"):
        self.rows, self.matmul = rows, matmul
        self.tx = optimizer(OPTIM, 1e-2, 10)
        self.model = model
        self.steps = {}

    def step(self, sizes, grad_accum=1, attn="xla"):
        """(compiled step, structs of the state) on a mesh of data, fsdp, seq, tensor."""
        if (sizes, grad_accum, attn) not in self.steps:
            config = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
            mesh = make_mesh(config, jax.devices()[: math.prod(sizes)])

            def make():
                return InternLM2(
                    self.model.config,
                    rngs=nnx.Rngs(0),
                    execution=Execution(attn=attn, dtype=jnp.float32, matmul=self.matmul),
                )

            graphdef, like = abstract_state(make, self.tx, mesh)
            sources = 1 if self.rows.sources is None else 2
            batch = batch_struct(
                rows=8, seq_len=24, grad_accum=grad_accum, mesh=mesh, sources=sources
            )
            step = make_step(graphdef, self.tx, schedule(OPTIM, 1e-2, 10), sources=sources)
            self.steps[sizes, grad_accum, attn] = compile_step(step, like, batch), like
        return self.steps[sizes, grad_accum, attn]

    def state(self, like):
        """Return the state before the first step."""
        copy = jax.tree.map(jnp.array, self.model)  # new_state consumes what it is given
        return new_state(params_of(copy, like), self.tx, like)

    def two_steps(self, sizes=ONE, grad_accum=1, attn="xla", rows=None):
        """Metrics of two steps and the parameters after them, as numpy."""
        step, like = self.step(sizes, grad_accum, attn)
        batch = put_batch(rows or self.rows, grad_accum=grad_accum, mesh=like.mesh)
        state, first = step(self.state(like), batch)
        state, second = step(state, batch)
        return jax.tree.map(np.asarray, (first, second, state.params))


@pytest.fixture(scope="module")
def trainer(tiny_model, packed_rows):
    """Make a trainer of rows in which the first documents are of another source."""
    sources = (packed_rows.segment_ids > 1).astype(np.uint8)
    return Trainer(tiny_model, packed_rows._replace(sources=sources))


@pytest.fixture(scope="module")
def reference(trainer):
    """8 rows in one microbatch on one device."""
    return trainer.two_steps()


@pytest.mark.parametrize("grad_accum", [2, 8])
def test_accumulation_changes_nothing(trainer, reference, grad_accum):
    """1 x 8 = 2 x 4 = 8 x 1, though microbatches have unequal numbers of targets."""
    got = trainer.two_steps(grad_accum=grad_accum)
    for ours, theirs in zip(got[:2], reference[:2], strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-6)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)
        assert ours["loss_tokens"] == theirs["loss_tokens"]
        np.testing.assert_allclose(ours["source_losses"], theirs["source_losses"], rtol=1e-5)
    _close(got[2], reference[2])


@pytest.mark.parametrize(
    ("sizes", "grad_accum", "attn"),
    [
        ((8, 1, 1, 1), 1, "xla"),
        ((1, 8, 1, 1), 1, "eager"),
        ((2, 2, 1, 2), 1, "xla"),
        (SEQ_4, 2, "eager"),  # kv heads are repeated, and every cut is inside a document
        (SEQ_2, 1, "xla"),
    ],
)
def test_eight_devices_equal_one(trainer, reference, sizes, grad_accum, attn):
    got = trainer.two_steps(sizes, grad_accum, attn)
    for ours, theirs in zip(got[:2], reference[:2], strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)
        np.testing.assert_allclose(ours["source_losses"], theirs["source_losses"], rtol=1e-5)
    _close(got[2], reference[2])


def test_a_run_resumes_on_another_seq(trainer, tmp_path):
    """From seq 1 to 4 to 2, by a checkpoint each time: the losses of one device throughout."""
    step, like = trainer.step(ONE)
    state, want = trainer.state(like), []
    for _ in range(3):
        state, metrics = step(state, put_batch(trainer.rows, grad_accum=1, mesh=like.mesh))
        want.append(float(metrics["loss"]))
    got = []
    for sizes, accum, attn in ((ONE, 1, "xla"), (SEQ_4, 2, "eager"), (SEQ_2, 1, "xla")):
        step, like = trainer.step(sizes, accum, attn)
        with Checkpoints(tmp_path, keep_last=1) as checkpoints:
            state = checkpoints.restore(like)[0] if got else trainer.state(like)
            batch = put_batch(trainer.rows, grad_accum=accum, mesh=like.mesh)
            state, metrics = step(state, batch)
            got.append(float(metrics["loss"]))
            if len(got) < len(want):
                checkpoints.save(state, data={"row": 8 * len(got)}, identity={})
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_seq_exchanges_heads_and_gathers_no_activations(trainer):
    """The compiled step has all-to-alls; what it gathers along T is segment ids and positions."""
    text = trainer.step(SEQ_4, 2, "eager")[0].as_text()
    assert " all-to-all(" in text
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
    assert gathered and not [t for t, shape in gathered if "24" in shape.split(",") and t != "s32"]


@pytest.mark.parametrize(("sizes", "grad_accum"), [(ONE, 1), (ONE, 2), (SEQ_2, 1)])
def test_fp8_is_nearly_the_same_step(tiny_model, packed_rows, reference, sizes, grad_accum):
    """On every axis of a mesh and in microbatches, which have scales of their own."""
    got = Trainer(tiny_model, packed_rows, matmul="fp8").two_steps(sizes, grad_accum)
    for ours, theirs in zip(got[:2], reference[:2], strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=0.01)
        np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=0.1)
        assert ours["skipped"] == 0 and ours["loss"] != theirs["loss"]


def test_fp8_skips_a_step_that_is_not_finite(tiny_model, packed_rows):
    """An inf in a weight is in every gradient, and nothing changes."""
    trainer = Trainer(tiny_model, packed_rows, matmul="fp8")
    step, like = trainer.step(ONE)
    state = trainer.state(like)
    weight = state.params["blocks"]["ffn"]["w2_FD"]
    state.params["blocks"]["ffn"]["w2_FD"] = weight.at[0, 0, 0].set(jnp.inf)
    before = jax.tree.map(np.asarray, state.params)
    state, metrics = step(state, put_batch(packed_rows, grad_accum=1, mesh=like.mesh))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.params))


def test_loss_is_the_mean_over_targets(trainer, packed_rows, reference):
    """Against the model's own logits, and the counts against the rows."""
    rows = jax.tree.map(jnp.asarray, packed_rows)
    logits_BTV = trainer.model(rows.tokens, positions=rows.positions, segment_ids=rows.segment_ids)
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows.targets)
    want = jnp.sum(losses_BT * rows.loss_mask) / jnp.sum(rows.loss_mask)
    np.testing.assert_allclose(reference[0]["loss"], want, rtol=1e-5)
    assert reference[0]["loss_tokens"] == packed_rows.loss_mask.sum()
    for source in (0, 1):
        mask_BT = packed_rows.loss_mask * (trainer.rows.sources == source)
        want = jnp.sum(losses_BT * mask_BT)
        np.testing.assert_allclose(reference[0]["source_losses"][source], want, rtol=1e-5)
        assert reference[0]["source_tokens"][source] == mask_BT.sum() > 0
    assert reference[0]["tokens"] == (packed_rows.segment_ids > 0).sum()
    assert reference[1]["loss"] < reference[0]["loss"]


def test_batch_without_targets_is_no_nan(trainer):
    empty = trainer.rows._replace(loss_mask=np.zeros_like(trainer.rows.loss_mask))
    first, _, params = trainer.two_steps(rows=empty)
    assert first["loss"] == first["grad_norm"] == first["loss_tokens"] == 0
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))


def test_a_skipped_step_is_as_if_its_batch_had_not_been(trainer):
    """Parameters, moments and their count are bitwise those of a run without the NaN."""
    step, like = trainer.step(ONE)
    good = put_batch(trainer.rows, grad_accum=1, mesh=like.mesh)
    mask = trainer.rows.loss_mask * np.float32(np.nan)
    bad = put_batch(trainer.rows._replace(loss_mask=mask), grad_accum=1, mesh=like.mesh)
    ends = {}
    for name, batches in {"with": [good, bad, good], "without": [good, good]}.items():
        state = trainer.state(like)
        for batch in batches:
            state, metrics = step(state, batch)
        assert (metrics["skipped"], metrics["in_a_row"]) == (len(batches) - 2, 0)
        assert int(state.step) == len(batches)
        ends[name] = jax.tree.map(np.asarray, (state.params, state.opt_state, metrics["lr"]))
    jax.tree.map(np.testing.assert_array_equal, ends["with"], ends["without"])


def test_a_weight_whose_update_is_not_finite_keeps_its_value(tiny_model, packed_rows):
    """One element of one matrix; all other weights are updated, and the step counts as bad."""
    trainer = Trainer(tiny_model, packed_rows)

    def spoil(updates, params):
        table = updates["embed_VD"]
        return updates | {"embed_VD": table.at[3, 5].set(jnp.nan).at[4, 0].set(jnp.inf)}

    trainer.tx = optax.chain(trainer.tx, optax.stateless(spoil))
    step, like = trainer.step(ONE)
    state = trainer.state(like)
    before = jax.tree.map(np.asarray, state.params)
    batch = put_batch(packed_rows, grad_accum=1, mesh=like.mesh)
    for n in (1, 2):
        state, metrics = step(state, batch)
        assert (metrics["not_finite"], metrics["in_a_row"], metrics["skipped"]) == (2, n, 0)
    table, old = np.asarray(state.params["embed_VD"]), before["embed_VD"]
    assert table[3, 5] == old[3, 5] and table[4, 0] == old[4, 0]
    assert np.isfinite(table).all() and (table[3] != old[3]).sum() == old.shape[1] - 1


def test_skipping_keeps_no_second_state(trainer, monkeypatch):
    """The step with its guard against one that always updates.

    Weights and each moment are a third of the state: a copy of any of them would show.
    """
    guarded, _ = trainer.step(ONE)
    monkeypatch.setattr("train.step.step.should_update", lambda guard, **_: (jnp.bool(True), guard))
    free, _ = Trainer(trainer.model, trainer.rows).step(ONE)
    assert guarded.cost_analysis()["flops"] > free.cost_analysis()["flops"]  # it does choose
    a, b = guarded.memory_analysis(), free.memory_analysis()
    assert a.temp_size_in_bytes - b.temp_size_in_bytes < 0.25 * a.alias_size_in_bytes
    assert a.alias_size_in_bytes == b.alias_size_in_bytes


def test_state_is_donated_and_keeps_its_place(trainer):
    """No second copy of weights and moments; every array stays sharded as it was."""
    step, like = trainer.step((2, 2, 1, 2))
    state = trainer.state(like)
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
    assert step.memory_analysis().alias_size_in_bytes >= 0.99 * held
    after, _ = step(state, put_batch(trainer.rows, grad_accum=1, mesh=like.mesh))
    assert all(a.is_deleted() for a in jax.tree.leaves(state))
    assert jax.tree.map(lambda a: a.sharding, after) == jax.tree.map(lambda a: a.sharding, like)


def _close(params, want):
    """Two Adam steps: an update is lr * g / |g| near g = 0, where rounding decides its sign."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), params, want)
