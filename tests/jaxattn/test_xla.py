"""The slices of the XLA attention: equal results, bounded size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxattn import xla
from tests.jaxattn.oracle import NAMES, exact, outputs, random_problem

B, T, S, N, K, H = 2, 37, 41, 4, 2, 8
IDS = np.repeat([1, 2, 0, 3], [10, 15, 4, 8])[None].repeat(B, 0)
KV_IDS = np.repeat([1, 3, 2], [20, 9, 12])[None].repeat(B, 0)
A_ROW = 4 * B * N * S  # bytes of the scores of one query


@pytest.mark.parametrize("rows", [1, 5, 36, 37], ids=lambda n: f"at most {n} queries")
def test_slices_do_not_change_the_result(rows, monkeypatch):
    """Slices that divide T or not, down to single queries: the oracle's o, dq, dk, dv."""
    monkeypatch.setattr(xla, "SLICE_BYTES", rows * A_ROW)
    mask = {"ids": IDS, "kv_ids": KV_IDS, "causal": False, "window": 20 + rows}  # traced anew
    problem = random_problem(0, B, T, S, N, K, H, np.float32, **mask)
    for x, want, of in zip(outputs(problem, "xla"), exact(problem), NAMES, strict=True):
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-5, err_msg=of)


@pytest.mark.parametrize(
    ("t", "s"), [(1, 1), (512, 512), (32_768, 32_768), (32_769, 31), (7, 10**7)]
)
def test_slices_cover_all_queries_within_the_bound(t, s):
    """As few equal slices as fit; a single query may exceed the bound, and then is a slice."""
    size, count = xla.slices(2, t, 32, s)
    assert size * count >= t > size * (count - 1)
    assert size == 1 or 4 * 2 * 32 * size * s <= xla.SLICE_BYTES


def test_no_array_of_the_gradient_exceeds_a_slice(monkeypatch):
    """Also under differentiation, nothing is larger than a slice's scores, or q itself."""
    monkeypatch.setattr(xla, "SLICE_BYTES", 4 * A_ROW)
    problem = random_problem(0, B, T, S, N, K, H, np.float32, ids=IDS, kv_ids=KV_IDS, window=19)
    mask = problem.mask

    def loss(q, k, v):
        return xla.attention(q, k, v, mask, scale=0.3).sum()

    gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))
    inputs = [jnp.asarray(x) for x in (problem.q, problem.k, problem.v)]
    size, count = xla.slices(B, T, N, S)
    assert size == 4
    bound = max(B * N * size * S, B * size * count * N * H)
    assert bound < B * N * T * S / 4, "the whole score matrix would be told apart"
    assert max(_sizes(gradient(*inputs).jaxpr)) <= bound


def _sizes(jaxpr):
    """Elements of every array that an equation makes, in all inner jaxprs."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from _sizes(inner)
