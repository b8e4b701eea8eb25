"""One contract for all implementations: the same masks, the same numbers, the same zeros.

The kernels run interpreted on a CPU, and as they are under `pytest -m gpu` on a Hopper GPU
(`test_gpu.py` has larger and random problems for that). Where beartype is not installed, replace
the options of pyproject.toml: `pytest -m gpu tests/jaxattn -o addopts=--import-mode=importlib`.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import block_map
from jaxattn.pallas import op
from jaxattn.pallas.wgmma.forward.context import SHORT_KV
from tests.jaxattn.interpret import interpreted
from tests.jaxattn.oracle import (
    NAMES,
    Problem,
    check_error,
    check_zeros,
    documents,
    exact,
    outputs,
    random_problem,
)

BF16, FP16 = jnp.bfloat16, jnp.float16
ANY_DEVICE = ("eager", "xla", "interpreted")
GPU_ONLY = tuple(pytest.param(impl, marks=pytest.mark.gpu) for impl in ("pallas", "cudnn"))

# 200 tokens, 2 query heads on 1 kv head: a forward tile is 32 + 32 queries x 128 keys.
PACKED = (1, 200, 200, 2, 1, 128, BF16)
# The second document starts at 32, so that a tile's two warpgroups need different key tiles.
RUNS = ((7, 32), (2, 134), (9, 1), (4, 20), (0, 13))

DOCUMENTS = "documents, one-token document, padding at the end"

# What a case shows: (B, T, S, N, K, H, dtype), mask.
CASES = {
    DOCUMENTS: (PACKED, {"ids": documents(RUNS)}),
    "documents in any order": (
        PACKED,
        {"ids": documents(((5, 130), (3, 14), (5, 3), (1, 30), (3, 9), (0, 4), (1, 10)))},
    ),
    "causal, B=2, ragged": ((2, 100, 100, 2, 1, 128, BF16), {}),
    "full, T < S": ((1, 72, 136, 2, 2, 128, BF16), {"causal": False}),
    "causal, T > S": ((1, 136, 72, 2, 1, 64, BF16), {}),
    "all-padding row, padding between documents, group of 6, fp16": (
        (2, 80, 80, 6, 1, 128, FP16),
        {"ids": documents(((0, 80),), ((1, 30), (0, 5), (2, 40), (0, 5)))},
    ),
    "documents, queries and keys of different lengths, group of 4": (
        (1, 72, 136, 4, 1, 128, BF16),
        {
            "ids": documents(((1, 40), (3, 20), (2, 12))),
            "kv_ids": documents(((2, 50), (1, 70), (0, 16))),
            "causal": False,
        },
    ),
    "window": ((1, 200, 200, 2, 2, 128, BF16), {"window": 50}),
    "window to both sides": ((1, 200, 200, 2, 2, 128, BF16), {"window": 150, "causal": False}),
    "window of 1": ((1, 70, 70, 2, 1, 64, BF16), {"window": 1}),
    "window without end": ((1, 72, 72, 2, 1, 64, BF16), {"window": 2**31 - 1}),
    "window beyond int32, to both sides": (
        (1, 40, 72, 2, 1, 64, BF16),
        {"window": 2**40, "causal": False},
    ),
    "window and documents, head_dim 64": (
        (1, 200, 200, 2, 1, 64, BF16),
        {"ids": documents(((1, 90), (2, 1), (5, 70), (3, 30), (0, 9))), "window": 30},
    ),
    # Ragged in both, a hole, a row and a column of blocks with nothing, other ones for each row.
    "blocks for each row, T < S, group of 2": (
        (2, 140, 300, 2, 1, 128, BF16),
        {
            "blocks": np.array([[[1, 0, 1], [0, 0, 0]], [[0, 0, 1], [1, 0, 1]]], bool),
            "causal": False,
        },
    ),
    "blocks, documents and window, head_dim 64": (
        (1, 390, 390, 2, 2, 64, BF16),
        {
            "blocks": np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]], bool),
            "ids": documents(((1, 100), (4, 250), (2, 30), (0, 10))),
            "window": 330,
        },
    ),
    "blocks, documents in any order": (
        (1, 384, 384, 2, 1, 128, BF16),
        {
            "blocks": np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool),
            "ids": documents(((5, 130), (3, 104), (5, 3), (1, 130), (3, 9), (0, 8))),
        },
    ),
}
# Each costs the interpreter several seconds: those that add no branch of the kernels run on GPUs.
NOT_INTERPRETED = {"window", "window of 1"}
# Interpreted by `test_packed_equals_alone` and `test_interpreted_kernels_are_free_of_races`.
ELSEWHERE = {DOCUMENTS}
# Those that together reach every branch; finding the branches of a case takes a second.
REACHING = (
    "blocks, documents and window, head_dim 64",
    "documents in any order",
    "full, T < S",
    DOCUMENTS,
)
ENDS = ("short", "whole")  # what an item's last tile may be in the forward kernel
FOR_CUDNN = {
    name
    for name, (_, mask) in CASES.items()
    if not {"ids", "blocks"} & set(mask) and ("window" not in mask or mask.get("causal", True))
}


def problem_of(name: str) -> Problem:
    sizes, mask = CASES[name]
    return random_problem(sum(map(ord, name)), *sizes, **mask)


@contextlib.contextmanager
def running(impl: str):
    """Yield the name of the implementation; interpreted kernels are pallas."""
    if impl == "interpreted":
        with interpreted():
            yield "pallas"
    else:
        yield impl


def all_cases():
    for name in CASES:
        for impl in ANY_DEVICE:
            if impl != "interpreted" or name not in NOT_INTERPRETED | ELSEWHERE:
                yield pytest.param(name, impl)
        for param in GPU_ONLY:
            if param.values[0] != "cudnn" or name in FOR_CUDNN:
                yield pytest.param(name, *param.values, marks=param.marks)


@pytest.mark.parametrize(("name", "impl"), list(all_cases()))
def test_output_and_gradients(name, impl):
    """o, dq, dk, dv are as near to the float64 oracle as plain einsums, padding exactly 0."""
    problem = problem_of(name)
    if impl == "xla" and problem.q.dtype == FP16 and jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="takes no float16 on a CPU"):
            outputs(problem, "xla")
        return
    with running(impl) as asked:
        got = outputs(problem, asked)
    check_zeros(problem, got)
    check_error(problem, got)


@pytest.mark.parametrize("impl", ["eager", "xla"])
@pytest.mark.parametrize("name", list(CASES)[:6])
def test_fp32_is_exact(name, impl):
    """In fp32 nothing is rounded to 16 bits on the way: within a few fp32 roundings."""
    (*sizes, _), mask = CASES[name]
    problem = random_problem(0, *sizes, np.float32, **mask)
    got = outputs(problem, impl)
    check_zeros(problem, got)
    for x, w, of in zip(got, exact(problem), NAMES, strict=True):
        np.testing.assert_allclose(x, w, rtol=0, atol=3e-6 * max(1.0, np.abs(w).max()), err_msg=of)


@pytest.mark.parametrize("impl", [*ANY_DEVICE, GPU_ONLY[0]])
def test_packed_equals_alone(impl):
    """A packed row gives, document by document, what each document alone in a row gives.

    Alone, a document stands at the start of a row of padding: other tiles, the same numbers up to
    roundings.
    """
    sizes, mask = CASES[DOCUMENTS]
    packed = random_problem(1, *sizes, **mask)
    ids = mask["ids"][0]
    with running(impl) as asked:
        together = outputs(packed, asked)
        for document in (2, 9):
            own = np.flatnonzero(ids == document)
            alone = _at_start(packed, own)
            apart = outputs(alone, asked)
            want = exact(alone)
            for x, y, w, of in zip(together, apart, want, NAMES, strict=True):
                a, b = (z.astype(np.float64) for z in (x[:, own], y[:, : own.size]))
                tolerance = 4 * float(jnp.finfo(x.dtype).eps) * max(np.abs(w).max(), 1e-3)
                assert np.abs(a - b).max() <= tolerance, f"{of} of document {document}"
    check_zeros(packed, together)
    check_error(packed, together)


@pytest.mark.parametrize("impl", ["eager", "xla"])
def test_packed_equals_unpacked_in_fp32(impl):
    """The same against rows that hold nothing but the document, in fp32."""
    (*sizes, _), mask = CASES["documents in any order"]
    packed = random_problem(1, *sizes, np.float32, **mask)
    together = outputs(packed, impl)
    for document in (1, 3, 5):
        own = np.flatnonzero(mask["ids"][0] == document)
        rows = {x: getattr(packed, x)[:, own] for x in ("q", "k", "v", "do")}
        for x, y, of in zip(together, outputs(Problem(**rows), impl), NAMES, strict=True):
            np.testing.assert_allclose(x[:, own], y, rtol=0, atol=1e-5, err_msg=of)


def _at_start(problem: Problem, own: np.ndarray) -> Problem:
    """Return the problem of these tokens alone, with padding in the rest of the row."""
    order = np.concatenate([own, np.setdiff1d(np.arange(problem.q.shape[1]), own)])
    ids = (np.arange(order.size) < own.size).astype(np.int32)[None]
    moved = {x: getattr(problem, x)[:, order] for x in ("q", "k", "v", "do")}
    return dataclasses.replace(problem, ids=ids, **moved)


def test_interpreted_kernels_are_free_of_races():
    """No access to shared memory but those of wgmma lacks a barrier that orders it."""
    sizes, mask = CASES[DOCUMENTS]
    problem = random_problem(2, *sizes, **mask)
    with interpreted(detect_races=True):
        got = outputs(problem, "pallas")
    check_error(problem, got)


def test_interpreted_cases_reach_every_branch_of_the_kernels():
    """Skipped, full, cut and compared tiles, for both warpgroups or one of them, holes."""
    both = ("one tile", "more tiles", "starts late", "full", "below", "above", "below and above")
    missing = {
        f"{kernel} {x}" for kernel in ("forward", "backward") for x in (*both, "ids", "a hole")
    }
    missing |= {"forward skips before", "forward skips behind"}
    missing |= {f"forward {n}, {end} at the end" for n in ("one", "more") for end in ENDS}
    assert not NOT_INTERPRETED & set(REACHING)
    for name in REACHING:
        missing -= branches(problem_of(name))
    assert not missing


_plan = jax.jit(op.prepare, static_argnums=(1, 2))


def branches(problem: Problem) -> set[str]:
    """Return the names of the branches that the kernels take in this problem."""
    q, k = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (problem.q, problem.k))
    plan = _plan(problem.mask, q, k).plan
    reached = set()
    kernels = (
        ("forward", plan.queries, plan.tiles.forward.block_kv),
        ("backward", plan.keys, plan.tiles.backward.block_q),
    )
    for kernel, found, tile_size in kernels:
        for group in np.asarray(found.work).reshape(-1, block_map.WORK_FIELDS).tolist():
            _, start, count, _, by_id, live_from, live_to, columns, full_from, full_to = group[:10]
            if found.cols is not None:
                steps = np.diff(np.asarray(found.cols)[start : start + count])
                reached |= {f"{kernel} a hole"} if (steps > tile_size).any() else set()
            reached |= {f"{kernel} one tile" if count == 1 else f"{kernel} more tiles"}
            reached |= {f"{kernel} starts late"} if start and found.cols is None else set()
            reached |= {f"{kernel} skips before"} if live_from > 0 else set()
            reached |= {f"{kernel} skips behind"} if live_to < count else set()
            length = "one" if live_to - live_from == 1 else "more"
            end = "short" if columns - (live_to - 1) * tile_size <= SHORT_KV else "whole"
            reached.add(f"{kernel} {length}, {end} at the end")
            for tile in range(live_from, live_to):
                cut = ["below"] * (tile < full_from) + ["above"] * (tile >= full_to)
                reached.add(f"{kernel} {'ids' if by_id else ' and '.join(cut) or 'full'}")
    return reached
