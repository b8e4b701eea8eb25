"""The deterministic backward, interpreted: right numbers, the same dk and dv, its own tiles."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.pallas import op
from jaxattn.pallas.wgmma import tiles as wgmma_tiles
from jaxattn.pallas.wgmma.tiles import ForwardTiles, choose_tiles
from tests.jaxattn.interpret import interpreted
from tests.jaxattn.oracle import (
    Problem,
    check_error,
    check_zeros,
    outputs,
    random_problem,
)
from tests.jaxattn.test_contract import CASES, DOCUMENTS, branches, problem_of

ANY_ORDER = "documents in any order"
# Of the contract's cases those that together reach every branch of the dq kernel.
REACHING = (ANY_ORDER, "window and documents, head_dim 64", "window to both sides")


@pytest.mark.parametrize("name", REACHING)
def test_output_and_gradients(name):
    """o, dq, dk, dv as near to the float64 oracle as plain einsums, padding exactly 0."""
    _check(problem_of(name))


@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"), [(6, 64, jnp.float16), (8, 128, jnp.bfloat16)]
)
def test_random_problem(group, head_dim, dtype):
    """Random lengths and documents, padding between them, for the groups with the most heads."""
    rng = np.random.default_rng(group)
    b, t = 2, int(rng.integers(20, 50))
    ids = np.cumsum(rng.random((b, t)) < 0.1, axis=1) % 5
    _check(random_problem(group, b, t, t, group, 1, head_dim, dtype, ids=ids))


def test_only_dq_differs_from_the_other_backward():
    """The dk/dv kernel without its dq part gives the same bits."""
    problem = random_problem(0, 1, 40, 56, 2, 1, 64, jnp.bfloat16)
    with interpreted():
        fast, repeatable = (outputs(problem, "pallas", deterministic=x) for x in (False, True))
    for i in (0, 2, 3):
        np.testing.assert_array_equal(repeatable[i], fast[i])
    check_error(problem, repeatable)


def test_tiles_of_its_own():
    """With other tiles than the forward's it walks over a block map of its own."""
    problem = random_problem(0, 1, 90, 90, 2, 1, 128, jnp.bfloat16)
    q, k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (problem.q, problem.k))
    tiles = choose_tiles(2, 1, 128)
    other = dataclasses.replace(tiles, dq=ForwardTiles(qheads_per_tile=1, block_kv=64, stages=3))
    with mock.patch.object(wgmma_tiles, "choose_tiles", lambda *_: other):
        plan = op.prepare(problem.mask, q, k).plan
        assert plan.dq is not None and plan.dq.row_bounds.shape != plan.queries.row_bounds.shape
        _check(problem)
    assert op.prepare(problem.mask, q, k).plan.dq is None


def test_free_of_races():
    """No access to shared memory but those of wgmma lacks a barrier that orders it."""
    sizes, mask = CASES[DOCUMENTS]
    _check(random_problem(2, *sizes, **mask), detect_races=True)


def test_cases_reach_every_branch():
    """Skipped, full, cut and compared tiles; its block map is the forward's."""
    states = ("one tile", "more tiles", "starts late", "full", "below", "above", "ids")
    missing = {f"forward {x}" for x in (*states, "skips before", "skips behind")}
    for name in (*REACHING, DOCUMENTS):
        missing -= branches(problem_of(name))
    assert not missing


def _check(problem: Problem, *, detect_races: bool = False) -> None:
    with interpreted(detect_races=detect_races):
        got = outputs(problem, "pallas", deterministic=True)
    check_zeros(problem, got)
    check_error(problem, got)
