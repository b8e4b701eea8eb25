"""Skip-step guard: decide inside the step whether a gradient may update the weights.

A step whose loss or gradient is not finite, or whose gradient norm is a spike, changes neither
parameters nor optimizer state, the optimizer's step count included. Training continues as if the
batch had not been drawn, and the learning-rate schedule waits one step. Only `TrainState.step`,
which counts batches, advances.

`jnp.where` selects the old or the new state; XLA on a GPU fuses the selection into the pass over
the weights that Adam makes anyway. A `lax.cond` around the update, compiled for an H200, needs the
same memory (16.97 GB beside the state, 1.8B with full remat), but writes all gradients in fp32
first and makes the host wait.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WARMUP = 20
"""Updates before the first spike is detected: the first norms predict the next ones badly."""

MEMORY = 50
"""Updates in the running mean of the norm."""


class Guard(NamedTuple):
    """Skip counters and the running mean of the gradient norm, part of the train state.

    Attributes:
        skipped: int32 scalar, steps skipped so far.
        in_a_row: int32 scalar, steps skipped since the last update.
        norm: float32 scalar, running mean of the gradient norm; 0 before the first update.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    norm: jax.Array


def new_guard() -> Guard:
    """Return the guard before the first step."""
    return Guard(skipped=jnp.int32(0), in_a_row=jnp.int32(0), norm=jnp.float32(0))


def should_update(
    guard: Guard, *, updates: jax.Array, loss: jax.Array, norm: jax.Array, spike: float
) -> tuple[jax.Array, Guard]:
    """Decide whether a step may update weights and optimizer state.

    Args:
        guard: before the step.
        updates: int32 scalar, updates done before the step.
        loss: float32 scalar, of the step.
        norm: float32 scalar, norm of the gradient before clipping.
        spike: largest norm that passes, as a multiple of the running mean; infinity: all pass.

    Returns:
        (bool scalar: True to update, the guard after the step). A spike enters the mean as the
        largest norm that would have passed, so that the mean follows when large norms persist.
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
