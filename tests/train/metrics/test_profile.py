"""The window is what was asked for, and its trace is on the disk."""

import jax.numpy as jnp

from train.metrics.profile import Profile


def test_trace_of_the_window(tmp_path):
    profile, x = Profile((2, 3), tmp_path / "profile"), jnp.ones(4)
    ended = []
    for step in range(1, 5):
        profile.before(step, x)
        x = x + 1
        ended.append(profile.after(step, x))
    assert ended == [False, False, True, False] and not profile.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_stops_inside_ends_it(tmp_path):
    profile = Profile((1, 3), tmp_path / "profile")
    profile.before(1, jnp.ones(1))
    assert profile.close() and not profile.close()
