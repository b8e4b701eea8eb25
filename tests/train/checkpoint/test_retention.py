"""The retention policy keeps the newest and the best checkpoints."""

import pytest

from train.checkpoint.retention import Retention

LOSSES = {1: 3.0, 2: 1.0, 4: 1.0, 6: 2.0}


@pytest.mark.parametrize(
    ("newest", "best", "kept"),
    [
        (1, 0, {7}),
        (2, 0, {6, 7}),
        (1, 1, {4, 7}),  # of two equal losses the later one
        (1, 3, {2, 4, 6, 7}),
        (2, 9, {1, 2, 4, 6, 7}),  # what was not evaluated is never among the best
    ],
)
def test_the_newest_and_the_best(newest, best, kept):
    steps = [1, 2, 3, 4, 5, 6, 7]
    assert Retention(newest=newest, best=best, losses=LOSSES).kept(steps) == kept


def test_a_loss_that_is_no_number_is_none():
    losses = {1: float("nan"), 2: 1.0, 3: 2.0, 4: float("inf")}
    assert Retention(newest=1, best=1, losses=losses).kept([1, 2, 3, 4]) == {2, 4}


def test_a_loss_that_comes_later_counts():
    losses = {}
    policy = Retention(newest=1, best=1, losses=losses)
    assert policy.kept([1, 2]) == {2}
    losses[1] = 5.0
    assert policy.kept([1, 2]) == {1, 2}
