"""Kernels of both families on a Hopper GPU: random problems on fresh seeds, runs against races.

Run with `pytest -m gpu tests/jaxattn`; where beartype is not installed, add
`-o addopts=--import-mode=importlib`. What interpret mode cannot show is shown here: asynchronous
products, programs that run at once, and the copies' own clipping. A failure names its seed, and
`SEED=... pytest ...` runs it again.

A program depends on shapes and on the kind of mask, not on the documents. Tests of one signature
follow each other, so that a process compiles it once: with several workers use `--dist=worksteal`,
which gives each of them neighboring tests.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import attention
from tests.jaxattn.oracle import (
    NAMES,
    Problem,
    check_error,
    check_zeros,
    exact,
    log_sum_exp,
    outputs,
    plain,
    random_problem,
    visible_pairs,
)

pytestmark = pytest.mark.gpu

BF16, FP16 = jnp.bfloat16, jnp.float16

# (B, T, S, N, K, H, dtype), causal, window. Lengths are multiples of nothing; each is compiled
# once and meets every pattern of documents.
SIGNATURES = {
    "causal": ((1, 1533, 1533, 8, 8, 128, BF16), True, None),
    "causal, 32 heads on 8, several items a program": (
        (1, 1021, 1021, 32, 8, 128, BF16),
        True,
        None,
    ),
    "causal, group of 6, B=3": ((3, 467, 467, 12, 2, 128, BF16), True, None),
    "causal, group of 2, fp16": ((2, 731, 731, 4, 2, 128, FP16), True, None),
    "full, T < S": ((2, 301, 1187, 4, 1, 128, BF16), False, None),
    "causal, T > S": ((1, 1399, 613, 2, 2, 128, BF16), True, None),
    "window smaller than a tile": ((1, 1777, 1777, 4, 4, 128, BF16), True, 37),
    "wide window to both sides": ((1, 1301, 1301, 8, 2, 128, BF16), False, 389),
    "head_dim 64": ((2, 909, 909, 8, 4, 64, BF16), True, None),
    "head_dim 64, window, group of 8, fp16": ((1, 1111, 1111, 8, 1, 64, FP16), True, 333),
    "head_dim 64, full": ((1, 517, 517, 6, 1, 64, BF16), False, None),
    "shorter than a tile": ((5, 19, 19, 4, 2, 128, BF16), True, None),
}


# Kernels by wgmma and by mma.sync; on a GPU without wgmma both names are the latter.
both_families = pytest.mark.parametrize("impl", ["pallas", "pallas_mma"])


@pytest.fixture(scope="module")
def seed() -> int:
    """Fresh in every run, unless SEED says which."""
    return int(os.environ.get("SEED", np.random.SeedSequence().entropy % 2**32))


def one_document(rng, length):
    return np.ones(length, np.int32)


def long_documents(rng, length):
    """Documents of a third of the row or so, then padding."""
    return _runs(rng, length, length // 3 + 1, padding=length // 10)


def short_documents(rng, length):
    """Documents of 1 to 60 tokens, many of a single one."""
    return _runs(rng, length, 30, padding=rng.integers(0, 40))


def padding_between(rng, length):
    """Every third run is padding."""
    ids = _runs(rng, length, 50, padding=0)
    return np.where(ids % 3 == 0, 0, ids)


def any_order(rng, length):
    """Few ids that come back again and again: only comparing them tells who sees whom."""
    return rng.integers(0, 4, length)[_runs(rng, length, 25, padding=0) % length]


PATTERNS = (one_document, long_documents, short_documents, padding_between, any_order)


# Both families and both backward passes are compared with one problem's results in float64, which
# take up to 8 s of a processor and up to 170 MB, so few are kept.
_for_neighbors = functools.lru_cache(maxsize=len(PATTERNS))


def _runs(rng, length, mean, padding):
    """Ids 1, 2, .. of contiguous runs with random lengths about the mean, then padding."""
    cuts = np.cumsum(np.maximum(1, rng.geometric(1 / mean, length)))
    ids = np.searchsorted(cuts, np.arange(length), side="right") + 1
    ids[length - padding :] = 0
    return ids


@pytest.mark.parametrize("deterministic", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda f: f.__name__)
@both_families
@pytest.mark.parametrize("name", SIGNATURES)
def test_random_problem(name, impl, pattern, deterministic, seed):
    """60 problems: within `FACTOR` of the plain einsum's error, exact zeros where none is seen.

    So are those of the deterministic backward; only its dq may differ from the other's.
    """
    problem = _random(name, pattern, seed)
    got = outputs(problem, impl, deterministic=deterministic)
    check_zeros(problem, got)
    check_error(problem, got, f"(SEED={seed})")
    if deterministic:
        for x, y, of in zip(got, outputs(problem, impl), NAMES, strict=True):
            if of != "dq":
                np.testing.assert_array_equal(
                    x.view(np.uint16), y.view(np.uint16), f"{of} (SEED={seed})"
                )


# (B, T, S, N, K, H, dtype), causal, window, share of live blocks, a pattern for each batch row.
BLOCK_SIGNATURES = {
    "causal, half, whole blocks": ((1, 2048, 2048, 8, 2, 128, BF16), True, None, 0.5, False),
    "causal, few, ragged, B=3": ((3, 1533, 1533, 8, 8, 128, BF16), True, None, 0.15, True),
    "full, T < S, group of 6, fp16": ((2, 301, 1187, 6, 1, 128, FP16), False, None, 0.4, True),
    "causal, T > S, one pattern": ((2, 1399, 613, 4, 2, 128, BF16), True, None, 0.6, False),
    "window, several items a program": ((1, 1777, 1777, 32, 8, 128, BF16), True, 700, 0.5, True),
    "head_dim 64, window to both sides": ((2, 909, 909, 8, 4, 64, BF16), False, 389, 0.7, True),
    "head_dim 64, group of 8": ((1, 1111, 1111, 8, 1, 64, BF16), True, None, 0.3, False),
}


@pytest.mark.parametrize(
    "pattern", [one_document, long_documents, any_order], ids=lambda f: f.__name__
)
@both_families
@pytest.mark.parametrize("name", BLOCK_SIGNATURES)
def test_block_patterns(name, impl, pattern, seed):
    """21 patterns with holes, empty rows and empty columns; `one_document` is without ids."""
    problem = _with_blocks(name, pattern, seed)
    got = outputs(problem, impl)
    check_zeros(problem, got)
    check_error(problem, got, f"(SEED={seed})")


@both_families
def test_a_pattern_of_all_blocks_changes_nothing(impl, seed):
    """o, dk and dv are the same bits as without it: the same tiles in the same order."""
    problem = random_problem(seed, 2, 1024, 1024, 8, 2, 128, BF16)
    plain = outputs(problem, impl)
    listed = outputs(dataclasses.replace(problem, blocks=np.ones((8, 8), bool)), impl)
    for x, y, of in zip(plain, listed, NAMES, strict=True):
        if of != "dq":
            np.testing.assert_array_equal(x.view(np.uint16), y.view(np.uint16), of)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda f: f.__name__)
@both_families
@pytest.mark.parametrize("name", ["causal, group of 6, B=3", "causal, group of 2, fp16"])
def test_scores_far_apart(name, impl, pattern, seed):
    """Scores up to thousands, which the forward's first pass cannot hold, next to ordinary ones.

    Output and log-sum-exp only: dq multiplies the rounding of o by keys of up to 100.
    """
    problem = _far_apart(name, pattern, seed)
    q, k, v = (jnp.asarray(x) for x in (problem.q, problem.k, problem.v))
    o, lse = _forward(q, k, v, problem.mask, impl)
    want = exact(problem)[0]
    error = np.abs(np.asarray(o, np.float64) - want).max()
    allowed = 1.5 * np.abs(plain(problem)[0] - want).max() + 2.0**-8 * np.abs(want).max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} (SEED={seed})"
    np.testing.assert_allclose(np.asarray(lse), log_sum_exp(problem), rtol=1e-5, atol=1e-4)


@functools.partial(jax.jit, static_argnames="impl")
def _forward(q, k, v, mask, impl):
    return attention(q, k, v, mask, impl=impl, return_lse=True)


@both_families
def test_thousand_documents(impl, seed):
    """1,000 documents of 1 to 7 tokens in a row, in which a tile has dozens.

    Measured 1.56 times the plain einsum's mean error of dq: the kernels take sum(p * dp) from o as
    rounded to 16 bits, as FlashAttention does, which shows where a query has a handful of keys.
    """
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(1, 1001), rng.integers(1, 8, 1000))
    t = ids.size + 13
    ids = np.concatenate([ids, np.zeros(13, int)])[None]
    problem = random_problem(seed, 1, t, t, 4, 1, 128, BF16, ids=ids)
    got = outputs(problem, impl)
    check_zeros(problem, got)
    check_error(problem, got, f"(SEED={seed})", factor=2.0)


@pytest.mark.parametrize("row", [0, 2])
@both_families
def test_row_of_padding(impl, row, seed):
    """A batch row without a document, first or last, is exactly 0 and disturbs no other."""
    rng = np.random.default_rng(seed)
    ids = np.stack([short_documents(rng, 333) for _ in range(3)])
    ids[row] = 0
    problem = random_problem(seed, 3, 333, 333, 6, 1, 128, BF16, ids=ids)
    got = outputs(problem, impl)
    check_zeros(problem, got)
    assert not visible_pairs(problem)[row].any() and not got[0][row].any()
    check_error(problem, got, f"(SEED={seed})")


@both_families
def test_packed_equals_unpacked(impl, seed):
    """Document by document, a packed row is what a row of that document alone gives."""
    lengths = (1, 63, 700, 129)
    ids = np.repeat(np.arange(1, 5), lengths)[None]
    packed = random_problem(seed, 1, ids.size, ids.size, 8, 2, 128, BF16, ids=ids)
    together = outputs(packed, impl)
    for document in range(1, 5):
        own = ids[0] == document
        alone = Problem(**{x: getattr(packed, x)[:, own] for x in ("q", "k", "v", "do")})
        want = exact(alone)
        for x, y, w, of in zip(together, outputs(alone, impl), want, NAMES, strict=True):
            difference = np.abs(x[:, own].astype(np.float64) - y.astype(np.float64)).max()
            tolerance = 4 * float(jnp.finfo(BF16).eps) * max(np.abs(w).max(), 1e-3)
            assert difference <= tolerance, f"{of} of document {document} (SEED={seed})"


@pytest.mark.parametrize("pattern", [one_document, short_documents], ids=lambda f: f.__name__)
@both_families
@pytest.mark.parametrize("name", ["causal, 32 heads on 8, several items a program", "head_dim 64"])
def test_twenty_runs_agree(name, impl, pattern, seed):
    """o, dk and dv are the same bits every time; dq moves by the order of its fp32 sums only.

    A missing barrier shows as a run that differs.
    """
    problem = _random(name, pattern, seed)
    first = outputs(problem, impl)
    check_error(problem, first, f"(SEED={seed})")
    for run in range(20):
        again = outputs(problem, impl)
        for x, y, of in zip(first, again, NAMES, strict=True):
            if of == "dq":
                x, y = (z.astype(np.float64) for z in (x, y))
                # One rounding of the element to 16 bits, and fp32 noise of the largest.
                allowed = float(jnp.finfo(problem.q.dtype).eps) * np.abs(x)
                allowed += 2.0**-18 * np.abs(x).max()
                assert (np.abs(x - y) <= allowed).all(), f"dq, run {run} (SEED={seed})"
                assert (x != y).mean() < 0.01, f"dq, run {run} (SEED={seed})"
            else:
                np.testing.assert_array_equal(
                    x.view(np.uint16), y.view(np.uint16), f"{of}, run {run} (SEED={seed})"
                )


@pytest.mark.parametrize(
    "pattern", [one_document, short_documents, any_order], ids=lambda f: f.__name__
)
@both_families
@pytest.mark.parametrize(
    "name",
    [
        "causal, 32 heads on 8, several items a program",
        "causal, group of 6, B=3",
        "head_dim 64",
        "wide window to both sides",
    ],
)
def test_twenty_deterministic_runs_are_equal(name, impl, pattern, seed):
    """o, dq, dk and dv are the same bits in each of 20 runs."""
    problem = _random(name, pattern, seed)
    first = outputs(problem, impl, deterministic=True)
    check_error(problem, first, f"(SEED={seed})")
    for run in range(20):
        again = outputs(problem, impl, deterministic=True)
        for x, y, of in zip(first, again, NAMES, strict=True):
            np.testing.assert_array_equal(
                x.view(np.uint16), y.view(np.uint16), f"{of}, run {run} (SEED={seed})"
            )


@_for_neighbors
def _random(name: str, pattern, seed: int) -> Problem:
    (b, t, s, *sizes), causal, window = SIGNATURES[name]
    seeds = [seed, *name.encode(), *pattern.__name__.encode()]
    rng = np.random.default_rng(seeds)
    ids = np.stack([pattern(rng, t) for _ in range(b)])
    kv_ids = None if t == s else np.stack([pattern(rng, s) for _ in range(b)])
    mask = {"ids": ids, "kv_ids": kv_ids, "causal": causal, "window": window}
    return random_problem(seeds, b, t, s, *sizes, **mask)


@_for_neighbors
def _with_blocks(name: str, pattern, seed: int) -> Problem:
    (b, t, s, *sizes), causal, window, share, by_row = BLOCK_SIGNATURES[name]
    seeds = [seed, *name.encode(), *pattern.__name__.encode()]
    rng = np.random.default_rng(seeds)
    blocks = rng.random((b if by_row else 1, -(-t // 128), -(-s // 128))) < share
    blocks[0, 1], blocks[0, :, 1] = False, False
    mask = {"causal": causal, "window": window, "blocks": blocks if by_row else blocks[0]}
    if pattern is not one_document:
        mask["ids"] = np.stack([pattern(rng, t) for _ in range(b)])
        mask["kv_ids"] = None if t == s else np.stack([pattern(rng, s) for _ in range(b)])
    return random_problem(seeds, b, t, s, *sizes, **mask)


@_for_neighbors
def _far_apart(name: str, pattern, seed: int) -> Problem:
    problem = _random(name, pattern, seed)
    rng = np.random.default_rng([seed, len(name)])
    large = np.where(rng.random(problem.k.shape[:3]) < 0.3, 10.0 ** rng.uniform(0, 2), 1.0)
    return dataclasses.replace(problem, k=(problem.k * large[..., None]).astype(problem.k.dtype))
