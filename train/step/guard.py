"""Gradients that would do harm: skipped inside the step, counted, and an end to it.

A step whose loss or gradient is not finite, or whose gradient norm is far above what it has been,
changes neither parameters nor optimizer, its count included: the batch is as if it had not been
drawn, and the learning rate's schedule waits one step. Only `TrainState.step`, which counts
batches, goes on.

Old or new is chosen by `where`, which XLA on a GPU puts into the one pass that Adam is anyway. A
`lax.cond` around the update, compiled for an H200, needs no less memory (16.97 GB beside the state
either way, 1.8B with full remat), but writes all gradients out in fp32 first and has the host wait.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WARMUP = 20
"""Updates before a spike can be one: the first norms say little about the next."""

MEMORY = 50
"""Updates that the mean norm goes back."""


class Guard(NamedTuple):
    """What has been skipped, and what is usual. Part of the state, and of its checkpoints.

    Attributes:
        skipped: int32 scalar, steps skipped so far.
        in_a_row: int32 scalar, those since the last update.
        norm: float32 scalar, running mean of the gradient norm; 0 before the first update.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    norm: jax.Array


def new_guard() -> Guard:
    """Nothing skipped, nothing known."""
    return Guard(skipped=jnp.int32(0), in_a_row=jnp.int32(0), norm=jnp.float32(0))


def judge(
    guard: Guard, *, updates: jax.Array, loss: jax.Array, norm: jax.Array, spike: float
) -> tuple[jax.Array, Guard]:
    """Whether a step may change anything.

    Args:
        guard: before the step.
        updates: int32 scalar, updates done before it.
        loss: of the step.
        norm: of its gradient, before clipping.
        spike: how many times the usual norm is too much; infinity: nothing is.

    Returns:
        (bool scalar: whether to update; the guard after the step). A norm that is too large counts
        in the mean as the largest that would have passed: so the mean follows when large norms
        become the rule.
    """
    known = (updates >= WARMUP) & (guard.norm > 0)
    largest = jnp.where(known, spike * guard.norm, jnp.inf)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    good = finite & (norm <= largest)

    share = 1 / jnp.minimum(updates + 1, MEMORY).astype(jnp.float32)
    mean = guard.norm + share * (jnp.minimum(norm, largest) - guard.norm)
    bad = (~good).astype(jnp.int32)
    return good, Guard(
        skipped=guard.skipped + bad,
        in_a_row=(guard.in_a_row + 1) * bad,
        norm=jnp.where(finite, mean, guard.norm),
    )
