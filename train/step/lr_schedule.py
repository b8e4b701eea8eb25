"""Learning-rate schedules: a linear warm-up, then a cosine, linear, constant or WSD shape.

References:
    WSD: "MiniCPM", Hu et al. 2024, arXiv:2404.06395, section 4.
"""

import math

import jax
import jax.numpy as jnp
import optax

from train.config.sections import OptimConfig


def schedule(config: OptimConfig, lr: float, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Args:
        config: warmup_ratio and decay_ratio are fractions of steps, min_lr_ratio one of lr.
        lr: peak learning rate.
        steps: optimizer steps of the whole run.

    Returns:
        step (int32 scalar, from 0) -> float32 scalar. The first step's rate is above 0, the
        warm-up ends in lr, and but for "constant" the last step's rate is min_lr_ratio * lr.
    """
    rise = min(math.ceil(config.warmup_ratio * steps), steps)
    rest = max(1, steps - 1 - rise)  # from the peak's step to the last one
    after = _SHAPES[config.schedule](config, lr, rest)
    warmup = optax.linear_schedule(lr / (rise + 1), lr, rise)
    rule = optax.join_schedules([warmup, after], [rise]) if rise else after

    def rate(step):
        # optax mixes Python floats with int32 step counts: legal, not under strict promotion
        with jax.numpy_dtype_promotion("standard"):
            return jnp.asarray(rule(step), jnp.float32)

    return rate


def _wsd(config: OptimConfig, lr: float, rest: int) -> optax.Schedule:
    fall = max(1, math.ceil(config.last_decay * rest))
    return optax.linear_schedule(lr, config.last_ratio * lr, fall, rest - fall)


_SHAPES = {
    "cosine": lambda c, lr, rest: optax.cosine_decay_schedule(lr, rest, c.last_ratio),
    "linear": lambda c, lr, rest: optax.linear_schedule(lr, c.last_ratio * lr, rest),
    "constant": lambda _, lr, __: optax.constant_schedule(lr),
    "wsd": _wsd,
}
