"""The learning rate follows the shape that the flags describe."""

import numpy as np
import pytest

from train.config.sections import OptimConfig
from train.step.lr_schedule import schedule


def test_cosine_rises_to_the_peak_and_falls_to_the_ratio():
    config = OptimConfig(warmup_ratio=0.1, min_lr_ratio=0.2)
    lr = [float(schedule(config, 1e-3, 100)(i)) for i in range(100)]
    assert 0 < lr[0] < lr[1] < lr[9] < lr[10] == pytest.approx(1e-3)
    np.testing.assert_allclose(np.diff(lr[:11]), 1e-3 / 11, rtol=1e-3)  # a line
    assert all(a > b for a, b in zip(lr[10:], lr[11:], strict=False))
    assert lr[99] == pytest.approx(2e-4)
    middle = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * 45 / 89))
    assert lr[55] == pytest.approx(1e-3 * middle, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", ["cosine", "linear", "constant", "wsd"])
def test_schedule_of_a_short_run_is_positive(shape, steps, warmup):
    rate = schedule(OptimConfig(warmup_ratio=warmup, schedule=shape), 1e-3, steps)
    assert all(0 < float(rate(i)) <= 1e-3 * (1 + 1e-6) for i in range(steps))


def rates(**kwargs):
    rate = schedule(OptimConfig(warmup_ratio=0.1, **kwargs), 1e-3, 100)
    return [float(rate(i)) for i in range(100)]


def test_linear_falls_in_a_line():
    lr = rates(schedule="linear", min_lr_ratio=0.1)
    assert lr[10] == pytest.approx(1e-3) and lr[99] == pytest.approx(1e-4)
    np.testing.assert_allclose(np.diff(lr[10:]), -0.9e-3 / 89, rtol=1e-3)


def test_constant_stays():
    assert rates(schedule="constant")[10:] == pytest.approx([1e-3] * 90)


def test_wsd_stays_then_falls():
    lr = rates(schedule="wsd", min_lr_ratio=0.0, decay_ratio=0.5)
    assert lr[10:55] == pytest.approx([1e-3] * 45) and lr[99] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(np.diff(lr[54:]), -1e-3 / 45, rtol=1e-3)
