"""AdamW with warm-up, cosine and clipping, from optax.

References:
    "Decoupled Weight Decay Regularization", Loshchilov and Hutter 2019, algorithm 2.
"""

import math

import jax
import jax.numpy as jnp
import optax

from train.sections import OptimConfig


def schedule(config: OptimConfig, lr: float, steps: int) -> optax.Schedule:
    """Learning rate by step: up in a line, down in half a cosine.

    Args:
        config: warmup is a share of steps, min_lr_ratio a share of lr.
        lr: the peak.
        steps: of the whole run.

    Returns:
        step (int32 scalar, from 0) -> float32 scalar. The first step's rate is above 0, the
        warm-up ends in lr, and the last step's rate is min_lr_ratio * lr.
    """
    rise = min(math.ceil(config.warmup * steps), steps)
    fall = optax.cosine_decay_schedule(lr, max(1, steps - 1 - rise), config.min_lr_ratio)
    warmup = optax.linear_schedule(lr / (rise + 1), lr, rise)
    rule = optax.join_schedules([warmup, fall], [rise]) if rise else fall

    def rate(step):
        with _promotion_of_optax():
            return jnp.asarray(rule(step), jnp.float32)

    return rate


def optimizer(config: OptimConfig, lr: float, steps: int) -> optax.GradientTransformation:
    """The whole update rule: clip to a global norm, then AdamW.

    Args:
        config: betas, decay, clip and the schedule's shape.
        lr: the peak learning rate.
        steps: of the whole run.

    Returns:
        An optax transformation over trees of float32 arrays; two moments per parameter.
    """
    rule = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, lr, steps),
            *config.betas,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )

    def update(updates, state, params=None):
        with _promotion_of_optax():
            return rule.update(updates, state, params)

    return optax.GradientTransformation(rule.init, update)


def decayed(params):
    """Which parameters weight decay pulls on: all but norms and biases, told by their names."""

    def is_matrix(path, _):
        name = str(getattr(path[-1], "key", path[-1]))
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _promotion_of_optax():
    """Optax mixes Python floats with int32 step counts: legal, but not under strict promotion."""
    return jax.numpy_dtype_promotion("standard")
