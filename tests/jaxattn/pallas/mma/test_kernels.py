"""The mma.sync kernels, interpreted: forward, backward and the deterministic dq.

The kernels are those of a GPU with 99 KiB of shared memory, whose backward has one warpgroup. On a
GPU, `tests/jaxattn/test_gpu.py` runs the kernels of Hopper.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import attention
from tests.jaxattn.interpret import interpreted
from tests.jaxattn.oracle import (
    check_error,
    check_zeros,
    documents,
    log_sum_exp,
    outputs,
    random_problem,
)

BLOCKS = np.array([[True, False, False], [True, True, False], [False, True, True]])
PROBLEMS = {
    "causal, group of 2": ((1, 100, 100, 2, 1, 128, jnp.bfloat16), {}),
    "documents, padding between, fp16": (
        (1, 110, 110, 1, 1, 128, jnp.float16),
        {"ids": documents(((1, 40), (0, 20), (2, 30), (3, 15), (0, 5)))},
    ),
    "window to both sides, T < S, batch of 2": (
        (2, 40, 90, 1, 1, 128, jnp.bfloat16),
        {"causal": False, "window": 30},
    ),
    "ids in any order, group of 8": (
        (1, 45, 45, 8, 1, 128, jnp.bfloat16),
        {"ids": np.repeat([[1, 2, 1, 3, 2, 1, 0, 3, 1]], 5, axis=1)},
    ),
    "block pattern": ((1, 300, 300, 1, 1, 128, jnp.bfloat16), {"blocks": BLOCKS}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_and_gradients(name):
    """o, dq, dk, dv as near to the float64 oracle as plain einsums, padding exactly 0.

    By both backward passes, which differ in dq only.
    """
    sizes, mask = PROBLEMS[name]
    problem = random_problem(len(name), *sizes, **mask)
    with interpreted(gpu="l40s"):
        fast, repeatable = (outputs(problem, "pallas", deterministic=x) for x in (False, True))
    for got in (fast, repeatable):
        check_zeros(problem, got)
        check_error(problem, got)
    for i in (0, 2, 3):
        np.testing.assert_array_equal(repeatable[i], fast[i])


def test_log_sum_exp():
    """Within fp32 rounding of float64, -inf where nothing is seen."""
    ids = documents(((1, 30), (0, 10), (2, 33)))
    problem = random_problem(0, 1, 73, 73, 4, 2, 128, jnp.bfloat16, ids=ids)
    q, k, v = (jnp.asarray(x) for x in (problem.q, problem.k, problem.v))
    with interpreted(gpu="l40s"):
        _, lse = attention(q, k, v, problem.mask, impl="pallas", return_lse=True)
    np.testing.assert_allclose(np.asarray(lse), log_sum_exp(problem), rtol=1e-5, atol=1e-5)


def test_pallas_mma_runs_as_on_hopper():
    """By name the kernels run on a Hopper GPU with its tiles: 128 rows, two stages."""
    problem = random_problem(1, 1, 140, 140, 2, 2, 128, jnp.bfloat16)
    q, k, v = (jnp.asarray(x) for x in (problem.q, problem.k, problem.v))
    with interpreted():
        o = jax.jit(lambda q, k, v: attention(q, k, v, impl="pallas_mma"))(q, k, v)
    want = outputs(problem, "eager")[0]
    np.testing.assert_allclose(np.asarray(o, np.float32), want.astype(np.float32), atol=0.03)
