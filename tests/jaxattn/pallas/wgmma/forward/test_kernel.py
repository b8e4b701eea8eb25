"""The forward kernel's two passes and its tiles, interpreted.

What the first pass cannot hold, the second does again; the last tile of an item may be short.
Everything else about the kernel is in the contract suite, whose scores the first pass can hold.
"""

import dataclasses
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import attention
from jaxattn.pallas import softmax
from jaxattn.pallas.wgmma import tiles as wgmma_tiles
from jaxattn.pallas.wgmma.forward import kernel as forward
from jaxattn.pallas.wgmma.tiles import choose_tiles
from tests.jaxattn.interpret import interpreted
from tests.jaxattn.oracle import Problem, documents, exact, log_sum_exp, plain, random_problem

LENGTH = 170


def rising(dtype=jnp.bfloat16) -> Problem:
    """Scores of some 100 behind the first 128 keys, of 1 before them."""
    problem = random_problem(0, 1, LENGTH, LENGTH, 2, 2, 64, dtype)
    factor = np.where(np.arange(LENGTH) < 128, 1, 32)[None, :, None, None]
    return dataclasses.replace(problem, k=(problem.k * factor).astype(problem.k.dtype))


def far_below() -> Problem:
    """Make a document that begins inside a tile of queries, after its first keys; all scores -140.

    An offset of 0 would do for none of its rows.
    """
    ids = documents(((1, 140), (2, LENGTH - 140)))
    problem = random_problem(1, 1, LENGTH, LENGTH, 2, 2, 64, jnp.bfloat16, ids=ids)
    second = (ids == 2)[:, :, None, None]
    q, k = problem.q.astype(np.float32), problem.k.astype(np.float32)
    q, k = np.where(second, 4.0 + q / 8, q), np.where(second, -4.4 + k / 8, k)
    return dataclasses.replace(problem, q=q.astype(jnp.bfloat16), k=k.astype(jnp.bfloat16))


def ordinary() -> Problem:
    """Make padding and documents inside a tile."""
    ids = documents(((1, 100), (0, 5), (2, 20), (3, 35), (0, 10)))
    return random_problem(2, 1, LENGTH, LENGTH, 2, 2, 64, jnp.bfloat16, ids=ids)


def on_the_grid() -> Problem:
    """Make a document inside a tile of queries whose first key is the first of a tile of keys."""
    ids = documents(((1, 40), (2, 128), (3, 32)))
    return random_problem(3, 1, 200, 200, 2, 2, 64, jnp.bfloat16, ids=ids)


def check(problem: Problem) -> None:
    """Output and log-sum-exp against float64."""
    q, k, v = (jnp.asarray(x) for x in (problem.q, problem.k, problem.v))
    o, lse = attention(q, k, v, problem.mask, impl="pallas", return_lse=True)
    want = exact(problem)[0]
    error = np.abs(np.asarray(o, np.float64) - want).max()
    allowed = 1.5 * np.abs(plain(problem)[0] - want).max() + 2.0**-9 * np.abs(want).max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
    np.testing.assert_allclose(np.asarray(lse), log_sum_exp(problem), rtol=1e-5, atol=1e-4)


def test_scores_out_of_reach():
    """Rows whose maximum is over 64 powers of two above that of their first tile are right."""
    with interpreted():
        check(rising())


def test_the_first_pass_alone_would_be_wrong():
    """So the second one has run in the test above."""
    with interpreted(), mock.patch.object(softmax, "set_flags", lambda *_: None):
        with pytest.raises(AssertionError):
            check(rising())


def test_flags_for_several_items():
    """Neighboring work tiles share a retry flag where a program has more tiles than flags."""
    with interpreted(), mock.patch.object(forward, "RETRY_FLAGS", 1):
        check(rising())


@pytest.mark.parametrize(
    "problem",
    [ordinary(), far_below(), on_the_grid()],
    ids=["ordinary", "far below", "on the grid"],
)
def test_scores_within_reach_are_done_once(problem):
    """The second pass, of a tile that is not the first, would show."""
    with interpreted(), mock.patch.object(softmax, "rescale", lambda x, alpha: x * jnp.nan):
        check(problem)


def test_fp16_has_only_the_online_pass():
    """Its 5 bits of exponent hold no 2**64."""
    with interpreted(), mock.patch.object(softmax, "set_flags", lambda *_: 1 / 0):
        check(rising(jnp.float16))


@pytest.mark.parametrize(("queries", "short"), [(64, True), (65, False)])
def test_a_short_tile_ends_behind_its_keys(queries, short):
    """64 queries see no more than 64 keys: what lies behind them, NaN here, is not even read."""
    problem = random_problem(3, 1, queries, 100, 2, 2, 64, jnp.bfloat16)
    q, k, v = (jnp.asarray(x) for x in (problem.q, problem.k, problem.v))
    v = v.at[:, 64:].set(jnp.nan)
    with interpreted():
        o = attention(q, k, v, problem.mask, impl="pallas")
    assert jnp.isfinite(o).all() == short


def test_tiles_that_are_short_already():
    """With 64 keys in every tile, no code for short ones."""
    tiles = choose_tiles(2, 2, 64)
    tiles = dataclasses.replace(
        tiles, forward=dataclasses.replace(tiles.forward, block_kv=64, stages=2)
    )
    with interpreted(), mock.patch.object(wgmma_tiles, "choose_tiles", lambda *_: tiles):
        check(ordinary())
