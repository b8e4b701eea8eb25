"""The optimizer is the AdamW of the paper, on the schedule that the flags describe."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.optim import decayed, optimizer, schedule
from train.sections import OptimConfig


def test_schedule_rises_to_the_peak_and_falls_to_the_ratio():
    config = OptimConfig(warmup=0.1, min_lr_ratio=0.2)
    lr = [float(schedule(config, 1e-3, 100)(i)) for i in range(100)]
    assert 0 < lr[0] < lr[1] < lr[9] < lr[10] == pytest.approx(1e-3)
    np.testing.assert_allclose(np.diff(lr[:11]), 1e-3 / 11, rtol=1e-3)  # a line
    assert all(a > b for a, b in zip(lr[10:], lr[11:], strict=False))
    assert lr[99] == pytest.approx(2e-4)
    middle = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * 45 / 89))
    assert lr[55] == pytest.approx(1e-3 * middle, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_schedule_of_a_short_run_is_positive(steps, warmup):
    rate = schedule(OptimConfig(warmup=warmup), 1e-3, steps)
    assert all(0 < float(rate(i)) <= 1e-3 * (1 + 1e-6) for i in range(steps))


def test_update_is_adamw_by_hand():
    """Three steps of Loshchilov and Hutter's algorithm 2 in float64, with clipping."""
    config = OptimConfig(betas=(0.8, 0.9), weight_decay=0.1, warmup=0.0, min_lr_ratio=1.0, clip=1.0)
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
