"""The log-sum-exp: its value, its gradient, and what it is for, joining results over keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxattn import Mask, attention
from tests.jaxattn.oracle import (
    Problem,
    check_error,
    check_zeros,
    documents,
    log_sum_exp,
    random_problem,
    visible_pairs,
)
from tests.jaxattn.test_contract import running

GPU = pytest.param("pallas", False, marks=pytest.mark.gpu)
GPU_DETERMINISTIC = pytest.param("pallas", True, marks=pytest.mark.gpu)
# (implementation, deterministic).
FORMS = [("eager", False), ("xla", False), ("interpreted", False), ("interpreted", True)]

# Short documents, one of a single token, padding between and behind them, a row of padding.
T = 56
IDS = documents(((7, 16), (0, 3), (2, 30), (9, 1), (0, 6)), ((0, T),))


def _problem(dtype) -> Problem:
    problem = random_problem(3, 2, T, T, 4, 2, 64, dtype, ids=IDS)
    rng = np.random.default_rng(4)
    return dataclasses.replace(problem, dlse=rng.standard_normal((2, T, 4), np.float32))


@functools.partial(jax.jit, static_argnames=("impl", "deterministic"))
def _both(q, k, v, do, dlse, mask, impl, deterministic):
    def attend(q, k, v):
        return attention(q, k, v, mask, impl=impl, deterministic=deterministic, return_lse=True)

    (o, lse), pullback = jax.vjp(attend, q, k, v)
    return lse, (o, *pullback((do, dlse)))


@pytest.mark.parametrize(("impl", "deterministic"), [*FORMS, GPU, GPU_DETERMINISTIC])
def test_value_and_gradient(impl, deterministic):
    """Natural log of the sum, fp32, -inf where nothing is seen; its gradient reaches q and k.

    The gradients that arrive at rows which see nothing are NaN, as joining two such rows makes
    them, and must not leave these rows.
    """
    problem = _problem(jnp.bfloat16)
    blind = ~visible_pairs(problem).any(axis=2)
    dlse = np.where(blind[:, :, None], np.nan, problem.dlse)
    problem = dataclasses.replace(problem, dlse=np.where(blind[:, :, None], 0, problem.dlse))
    inputs = [jnp.asarray(x) for x in (problem.q, problem.k, problem.v, problem.do, dlse)]
    with running(impl) as asked, jax.numpy_dtype_promotion("standard"):
        lse, got = _both(*inputs, problem.mask, asked, deterministic)
    assert lse.dtype == jnp.float32
    want = log_sum_exp(problem)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want))
    np.testing.assert_allclose(np.asarray(lse), want, rtol=1e-5, atol=1e-5)
    got = tuple(np.asarray(x) for x in got)
    check_zeros(problem, got)
    check_error(problem, got)


@pytest.mark.parametrize("impl", ["eager", "xla"])
def test_forward_mode(impl):
    """Queries without a visible key have a constant result; all tangents are finite."""
    problem = _problem(np.float32)
    q, k, v = (jnp.asarray(x) for x in (problem.q, problem.k, problem.v))

    def lse(q, k):
        return attention(q, k, v, problem.mask, impl=impl, return_lse=True)[1]

    tangents = np.asarray(jax.jit(lambda q, k: jax.jvp(lse, (q, k), (q, k))[1])(q, k))
    blind = ~visible_pairs(problem).any(axis=2)
    np.testing.assert_array_equal(tangents[blind], 0)
    assert np.isfinite(tangents).all() and (tangents[~blind] != 0).all()


@pytest.mark.parametrize("impl", ["eager", "xla"])
def test_results_over_parts_of_the_keys_join(impl):
    """Weighted by the exponentials of their log-sum-exps they are the result over all keys.

    So are their gradients: what attention over a ring of devices rests on. Padding sees nothing in
    any part, and queries of the second document nothing in the first part.
    """
    q, k, v, do = (
        jnp.asarray(x)
        for x in dataclasses.astuple(random_problem(5, 1, 24, 40, 4, 2, 8, np.float32))[:4]
    )
    ids = jnp.repeat(jnp.arange(1, 4) % 3, 8, total_repeat_length=24)[None]
    kv_ids = jnp.repeat(jnp.arange(1, 5) % 3, 13, total_repeat_length=40)[None]

    def joined(q, k, v):
        parts = []
        for part in (slice(0, 13), slice(13, 40)):
            mask = Mask(segment_ids=ids, kv_segment_ids=kv_ids[:, part], causal=False)
            parts.append(attention(q, k[:, part], v[:, part], mask, impl=impl, return_lse=True))
        whole = jnp.logaddexp(parts[0][1], parts[1][1])
        whole = jnp.where(jnp.isneginf(whole), 0.0, whole)
        return sum(o * jnp.exp(lse - whole)[..., None] for o, lse in parts)

    def at_once(q, k, v):
        mask = Mask(segment_ids=ids, kv_segment_ids=kv_ids, causal=False)
        return attention(q, k, v, mask, impl=impl)

    for f, g in zip(*(_with_gradients(x, do, q, k, v) for x in (joined, at_once)), strict=True):
        np.testing.assert_allclose(f, g, rtol=0, atol=2e-6)


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(attend, do, *inputs):
    out, pullback = jax.vjp(attend, *inputs)
    return out, *pullback(do)


@pytest.mark.parametrize("impl", ["eager", "xla"])
def test_sharded_equals_unsharded(impl):
    """Rows and heads over 8 devices: the same log-sum-exp, split as the queries are."""
    problem = _problem(np.float32)
    q, k, v = (jnp.asarray(x) for x in (problem.q, problem.k, problem.v))
    attend = jax.jit(functools.partial(attention, impl=impl, return_lse=True))
    want = attend(q, k, v, problem.mask)[1]
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        heads = NamedSharding(mesh, PartitionSpec("d", None, "m", None))
        rows = NamedSharding(mesh, PartitionSpec("d", None))
        mask = Mask(segment_ids=jax.device_put(problem.mask.segment_ids, rows))
        lse = attend(*(jax.device_put(x, heads) for x in (q, k, v)), mask)[1]
        assert jax.typeof(lse).sharding.spec == PartitionSpec("d", None, "m")
    np.testing.assert_allclose(np.asarray(lse), np.asarray(want), rtol=1e-5, atol=1e-5)


def test_cudnn_refuses(on_hopper):
    """Jax.nn rounds cuDNN's to 16 bits and drops its gradient: better none."""
    q = jnp.zeros((1, 16, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="return_lse=True.*use impl='pallas'"):
        attention(q, q, q, impl="cudnn", return_lse=True)
