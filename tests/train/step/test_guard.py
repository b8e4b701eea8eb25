"""The skip-step guard skips spikes, learns the usual norm and accepts a new usual norm."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.step.guard import MEMORY, WARMUP, new_guard, should_update


def after(norms, *, spike=10.0, loss=1.0):
    """Return (True for each norm that passed, the guard at the end)."""
    guard, updates, passed = new_guard(), 0, []
    for norm in norms:
        good, guard = should_update(
            guard,
            updates=jnp.int32(updates),
            loss=jnp.float32(loss),
            norm=jnp.float32(norm),
            spike=spike,
        )
        updates += int(good)
        passed.append(bool(good))
    return passed, guard


@pytest.mark.parametrize("norm", [np.nan, np.inf])
def test_not_finite_is_skipped_from_the_first_step(norm):
    passed, guard = after([norm, 1.0, norm, norm])
    assert passed == [False, True, False, False]
    assert (int(guard.skipped), int(guard.in_a_row), float(guard.norm)) == (3, 2, 1.0)


def test_a_loss_that_is_not_finite_is_skipped():
    assert after([1.0], loss=np.nan)[0] == [False]


def test_a_spike_is_skipped_once_the_usual_norm_is_known():
    assert all(after([1.0] * (WARMUP - 1) + [100.0])[0])
    passed, guard = after([1.0] * WARMUP + [9.9, 100.0, 1.0])
    assert passed == [True] * WARMUP + [True, False, True]
    assert (int(guard.skipped), int(guard.in_a_row)) == (1, 0)


def test_infinite_spike_never_skips():
    assert all(after([0.0] * WARMUP + [1e-9, 1e9], spike=np.inf)[0])


def test_zero_norms_make_no_spike():
    assert all(after([0.0] * WARMUP + [1.0])[0])


def test_the_mean_is_of_all_at_first_and_then_of_the_last():
    np.testing.assert_allclose(after([1.0, 2.0, 6.0])[1].norm, 3.0)
    assert abs(float(after([1.0] * 9 + [2.0] * 5 * MEMORY)[1].norm) - 2.0) < 0.05


def test_a_new_usual_is_accepted_in_the_end():
    """A rule that never looked at what it skips would skip these for ever."""
    passed, _ = after([1.0] * WARMUP + [30.0] * 10)
    assert not passed[WARMUP] and passed[-1]
