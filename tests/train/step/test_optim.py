"""AdamW matches the paper; every optimizer learns and resumes from a checkpoint exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.execution import Execution
from models.internlm2 import InternLM2
from train.checkpoint.checkpoints import Checkpoints
from train.config.sections import MeshConfig, OptimConfig
from train.distributed.mesh import make_mesh
from train.step.lr_schedule import schedule
from train.step.optim import decayed, optimizer
from train.step.state import abstract_state, new_state, params_of
from train.step.step import batch_struct, compile_step, make_step, put_batch

pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_update_is_adamw_by_hand():
    """Three steps of Loshchilov and Hutter's algorithm 2 in float64, with clipping."""
    config = OptimConfig(
        betas=(0.8, 0.9), weight_decay=0.1, warmup_ratio=0.0, min_lr_ratio=1.0, clip=1.0
    )
    tx = optimizer(config, 0.01, 10)
    p = {"w_DF": jnp.array([[1.0, -2.0]]), "norm_D": jnp.array([3.0, 4.0])}
    state = tx.init(p)
    want = {k: np.asarray(v, np.float64) for k, v in p.items()}
    m = {k: np.zeros_like(v) for k, v in want.items()}
    v = {k: np.zeros_like(x) for k, x in want.items()}
    for t, scale in enumerate([0.1, 5.0, 2.0], 1):
        g = {
            k: scale * np.asarray(x, np.float64)
            for k, x in zip(p, ([[0.5, 1.0]], [1.0, -1.0]), strict=True)
        }
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        updates, state = tx.update({k: jnp.asarray(x, jnp.float32) for k, x in g.items()}, state, p)
        p = {k: p[k] + updates[k] for k in p}
        for k in want:
            clipped = g[k] / max(1.0, norm)
            m[k] = 0.8 * m[k] + 0.2 * clipped
            v[k] = 0.9 * v[k] + 0.1 * clipped**2
            adam = m[k] / (1 - 0.8**t) / (np.sqrt(v[k] / (1 - 0.9**t)) + 1e-8)
            decay = 0.1 * want[k] if k == "w_DF" else 0.0
            want[k] = want[k] - 0.01 * (adam + decay)
    for k in want:
        np.testing.assert_allclose(p[k], want[k], rtol=1e-5)


def test_norms_and_biases_do_not_decay():
    params = {"norm_D": 0, "blocks": {"attention": {"wo_NHD": 0, "wo_bias_D": 0}, "ffn_norm_D": 0}}
    assert decayed(params) == {
        "norm_D": False,
        "blocks": {"attention": {"wo_NHD": True, "wo_bias_D": False}, "ffn_norm_D": False},
    }


RULES = {
    "adafactor": OptimConfig(name="adafactor"),
    "lion": OptimConfig(name="lion", lr=1e-3),
    "muon": OptimConfig(name="muon"),
    "bf16": OptimConfig(moment_dtype="bf16"),
    # float32 weights with int8 moments learn in test_adam8bit_training.py, on one device.
    "int8, bf16 weights": OptimConfig(moment_dtype="int8"),
}


@pytest.mark.parametrize("rule", RULES)
def test_learns_and_resumes_exactly_on_a_mesh(rule, tiny, tiny_model, packed_rows, tmp_path):
    """Four steps, and two steps, a checkpoint and two steps: the same bits; the loss falls.

    Weights, moments and scales are split over 2 x 2 x 2 devices.
    """
    config, param_dtype = RULES[rule], jnp.bfloat16 if "weights" in rule else jnp.float32
    mesh = make_mesh(MeshConfig(fsdp=2, seq=2, tensor=2))
    lr = config.lr or 1e-2
    tx = optimizer(config, lr, 10, param_dtype=param_dtype)

    def make():
        kwargs = {"attn": "xla", "dtype": jnp.float32, "param_dtype": param_dtype}
        return InternLM2(tiny, rngs=nnx.Rngs(0), execution=Execution(**kwargs))

    graphdef, like = abstract_state(make, tx, mesh)
    batch = batch_struct(rows=8, seq_len=24, grad_accum=1, mesh=mesh)
    step = compile_step(make_step(graphdef, tx, schedule(config, lr, 10)), like, batch)
    batch = put_batch(packed_rows, grad_accum=1, mesh=mesh)
    state = new_state(params_of(jax.tree.map(jnp.array, tiny_model), like), tx, like)
    losses = []
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        for number in range(1, 5):
            state, values = step(state, batch)
            losses.append(float(values["loss"]))
            if number == 2:
                checkpoints.save(state, data={}, identity={})
        checkpoints.wait()
        again, _ = checkpoints.restore(like)
    for _ in range(2):
        again, _ = step(again, batch)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    assert jax.tree.map(lambda a: a.sharding, state) == jax.tree.map(lambda a: a.sharding, like)
    assert all(p.dtype == param_dtype for p in jax.tree.leaves(state.params))


def test_muon_makes_every_matrix_orthogonal():
    """Singular values of an update are close to each other, for each layer and head."""
    rng = np.random.default_rng(0)
    shapes = {"wqkv_DKgH": (2, 32, 2, 4, 8), "wo_NHD": (2, 4, 8, 32), "w1_DF": (2, 32, 64)}
    params = {k: jnp.zeros(s) for k, s in shapes.items()} | {"output_DV": jnp.zeros((32, 64))}
    grads = {k: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for k, p in params.items()}
    config = OptimConfig(name="muon", warmup_ratio=0.0, weight_decay=0.0)
    tx = optimizer(config, 1.0, 10)
    updates = jax.tree.map(np.asarray, tx.update(grads, tx.init(params), params)[0])
    heads = np.moveaxis(updates["wqkv_DKgH"], 1, 3).reshape(-1, 32, 8)
    outs = updates["wo_NHD"].reshape(-1, 32, 32)
    for matrices in (heads, outs, updates["w1_DF"]):
        values = np.linalg.svd(matrices, compute_uv=False)
        largest = 0.2 * max(matrices.shape[1:]) ** 0.5  # times 0.7 to 1.2 after 5 iterations
        assert 0.3 * largest < values.min() and values.max() < 1.4 * largest
    np.testing.assert_allclose(np.abs(updates["output_DV"]), 1.0, rtol=0.01)  # Adam's first step
