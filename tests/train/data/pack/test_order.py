"""The shuffle is a permutation, fixed for ever by its key."""

import numpy as np

from train.data.pack.order import shuffled


def test_known_orders_do_not_change():
    """A change here breaks the resumption of every run there is."""
    assert shuffled(8, 0).tolist() == GOLDEN_0
    assert shuffled(8, 0, 1, 5).tolist() == GOLDEN_0_1_5


def test_every_number_is_there_once():
    assert np.array_equal(np.sort(shuffled(1000, 3)), np.arange(1000))
    assert shuffled(0, 1).tolist() == []


def test_keys_give_different_orders():
    assert shuffled(100, 1).tolist() != shuffled(100, 2).tolist()
    assert shuffled(100, 1, 1, 0).tolist() != shuffled(100, 1, 1, 1).tolist()


GOLDEN_0 = [3, 2, 1, 6, 0, 7, 4, 5]
GOLDEN_0_1_5 = [1, 6, 3, 0, 2, 7, 4, 5]
