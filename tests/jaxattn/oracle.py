"""Compute attention in float64 from its definition, and the error that a result may have.

Nothing here is shared with the implementations: the mask is a rule for one pair of tokens, and the
gradients are written out by hand.

B batch, T query pos, S key pos, N query heads, K kv heads, H head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxattn import Mask, attention

NAMES = ("o", "dq", "dk", "dv")
# How much larger than the plain einsum's an implementation's error may be.
FACTOR = 1.5
NOISE = 4e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one attention and what restricts it, as numpy arrays in the dtype under test.

    Attributes:
      q, k, v, do: [B, T, N, H], [B, S, K, H], [B, S, K, H], [B, T, N, H].
      ids: segment ids of the queries [B, T], or None.
      kv_ids: segment ids of the keys [B, S], or None: those of the queries.
      causal: whether queries see no later keys.
      window: sliding window in tokens, or None.
      blocks: block pattern, [T / 128, S / 128] or one for each batch row, or None.
      dlse: gradient of the log-sum-exp [B, T, N]; None: nobody uses it.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    do: np.ndarray
    ids: np.ndarray | None = None
    kv_ids: np.ndarray | None = None
    causal: bool = True
    window: int | None = None
    blocks: np.ndarray | None = None
    dlse: np.ndarray | None = None

    @property
    def mask(self) -> Mask:
        """The mask as the interface takes it."""
        return Mask(
            segment_ids=None if self.ids is None else jnp.asarray(self.ids, jnp.int32),
            kv_segment_ids=None if self.kv_ids is None else jnp.asarray(self.kv_ids, jnp.int32),
            causal=self.causal,
            window=self.window,
            blocks=None if self.blocks is None else jnp.asarray(self.blocks),
        )

    @functools.cached_property
    def results(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """(`exact`, `plain`) of this problem, computed once: every implementation is compared."""
        return _by_definition(self)


def random_problem(seed, b: int, t: int, s: int, n: int, k: int, h: int, dtype, **mask) -> Problem:
    """Draw normal random inputs of these sizes."""
    rng = np.random.default_rng(seed)
    shapes = ((b, t, n, h), (b, s, k, h), (b, s, k, h), (b, t, n, h))
    q, k_, v, do = (rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes)
    return Problem(q=q, k=k_, v=v, do=do, **mask)


def documents(*rows: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Segment ids from runs of (id, length), one tuple of runs a row."""
    return np.stack([np.repeat(*np.array(runs).T) for runs in rows]).astype(np.int32)


def sees(i, j, query_id, key_id, causal: bool, window: int | None):
    """Return True if query i of document query_id sees key j of document key_id."""
    answer = (query_id == key_id) & (query_id != 0)
    if causal:
        answer &= i >= j
    if window is not None:
        answer &= i - j < window
        answer &= causal | (j - i < window)
    return answer


def visible_pairs(problem: Problem) -> np.ndarray:
    """`sees` for every pair: bool [B, T, S]."""
    (b, t), s = problem.q.shape[:2], problem.k.shape[1]
    ids = np.ones((b, t), int) if problem.ids is None else problem.ids
    kv_ids = problem.kv_ids
    if kv_ids is None:
        kv_ids = np.ones((b, s), int) if problem.ids is None else problem.ids
    i, j = np.arange(t)[None, :, None], np.arange(s)[None, None, :]
    pairs = sees(i, j, ids[:, :, None], kv_ids[:, None, :], problem.causal, problem.window)
    if problem.blocks is not None:
        pairs = pairs & problem.blocks[..., i // 128, j // 128].reshape(-1, t, s)
    return np.broadcast_to(pairs, (b, t, s))


def exact(problem: Problem) -> tuple[np.ndarray, ...]:
    """o, dq, dk, dv in float64."""
    return problem.results[0]


def plain(problem: Problem) -> tuple[np.ndarray, ...]:
    """Compute attention by plain einsums in the dtype under test, for `check_error`.

    Factors of every product and the results are rounded to the dtype; sums, the softmax and all
    between are exact, so it does not depend on a device. (`jaxattn.eager` is no such measure: its
    backward multiplies the fp32 gradient of the scores, unrounded.)
    """
    return problem.results[1]


def log_sum_exp(problem: Problem) -> np.ndarray:
    """Of the scores that each query sees, in float64 [B, T, N]; -inf where there are none."""
    pairs = visible_pairs(problem)
    scale, group = problem.q.shape[3] ** -0.5, problem.q.shape[2] // problem.k.shape[2]
    q, k = (x.astype(np.float64) for x in (problem.q, problem.k))
    s = scale * np.einsum("btnh,bsnh->btns", q, np.repeat(k, group, axis=2))
    return np.logaddexp.reduce(np.where(pairs[:, :, None], s, -np.inf), axis=3)


def _by_definition(problem: Problem) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Return the results in float64 and those of rounded factors: they share all but products."""
    q, k, v, do = (x.astype(np.float64) for x in (problem.q, problem.k, problem.v, problem.do))
    pairs = visible_pairs(problem)
    scale, group = q.shape[3] ** -0.5, q.shape[2] // k.shape[2]
    exact, rounded = (tuple(np.zeros_like(x) for x in (q, q, k, v)) for _ in range(2))
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            at, kv_at = (b, slice(None), n), (b, slice(None), n // group)
            s = np.where(pairs[b], scale * q[at] @ k[kv_at].T, -np.inf)
            largest = s.max(axis=1, keepdims=True)
            p = np.exp(s - np.where(np.isfinite(largest), largest, 0.0))
            total = p.sum(axis=1, keepdims=True)
            p /= np.where(total > 0, total, 1.0)
            dp = do[at] @ v[kv_at].T
            ds = p * (dp - (p * dp).sum(axis=1, keepdims=True))
            if problem.dlse is not None:
                ds = ds + p * problem.dlse[at][:, None]
            factors = (p, ds), tuple(_round(problem, x) for x in (p, ds))
            for (o, dq, dk, dv), (p, ds) in zip((exact, rounded), factors, strict=True):
                o[at] = p @ v[kv_at]
                dq[at] = scale * ds @ k[kv_at]
                dk[kv_at] += scale * ds.T @ q[at]
                dv[kv_at] += p.T @ do[at]
    return exact, tuple(_round(problem, x) for x in rounded)


def _round(problem: Problem, x: np.ndarray) -> np.ndarray:
    return x.astype(problem.q.dtype).astype(np.float64)


@functools.partial(jax.jit, static_argnames=("impl", "deterministic"))
def _outputs(q, k, v, do, mask: Mask, impl: str, deterministic: bool) -> tuple[Array, ...]:
    def attend(q, k, v):
        return attention(q, k, v, mask, impl=impl, deterministic=deterministic)

    o, vjp = jax.vjp(attend, q, k, v)
    return o, *vjp(do)


def outputs(
    problem: Problem, impl: str, mask: Mask | None = None, *, deterministic: bool = False
) -> tuple[np.ndarray, ...]:
    """o, dq, dk, dv of an implementation, through the public interface."""
    inputs = [jnp.asarray(x) for x in (problem.q, problem.k, problem.v, problem.do)]
    # jax.nn's own attention, and the transpose of its products, promote bf16 to fp32.
    promotion = "standard" if impl in ("xla", "cudnn") else "strict"
    with jax.numpy_dtype_promotion(promotion):
        got = _outputs(*inputs, problem.mask if mask is None else mask, impl, deterministic)
    return tuple(np.asarray(x) for x in got)


def check_zeros(problem: Problem, got: tuple[np.ndarray, ...]) -> None:
    """Check that queries without keys, and keys without queries, are exactly 0 in every output."""
    pairs = visible_pairs(problem)
    blind, unseen = ~pairs.any(axis=2), ~pairs.any(axis=1)
    for name, x, rows in zip(NAMES, got, (blind, blind, unseen, unseen), strict=True):
        assert np.isfinite(x.astype(np.float32)).all(), f"{name} is not finite"
        assert not x[rows].any(), f"{name} is not 0 where nothing is seen"


def check_error(
    problem: Problem, got: tuple[np.ndarray, ...], note: str = "", *, factor: float = FACTOR
) -> None:
    """Max and mean error are at most `factor` times those of the plain einsum in the same dtype.

    The max, one number of thousands, has half a rounding of the largest value on top: a result
    next to the middle between two numbers of the dtype falls to either side, however good its
    computation. `NOISE` counts only where the exact result is 0 (a token that sees only itself has
    no dq), which fp32 sums in another order miss by their last bits.
    """
    for name, x, p, w in zip(NAMES, got, plain(problem), exact(problem), strict=True):
        error, plain_error = np.abs(x.astype(np.float64) - w), np.abs(p - w)
        tie = float(jnp.finfo(x.dtype).eps) / 2 * np.abs(w).max()
        for measure, slack in ((np.max, tie + NOISE), (np.mean, NOISE)):
            allowed = factor * measure(plain_error) + slack
            assert measure(error) <= allowed, (
                f"{name}: {measure.__name__} error {measure(error):.3e} exceeds {factor} x the "
                f"plain einsum's {measure(plain_error):.3e} + {slack:.3e} {note}"
            )
