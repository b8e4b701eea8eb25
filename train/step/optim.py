"""Optimizers from optax: clip gradients, take a direction, decay weights, scale by the rate.

References:
    AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    Adafactor: Shazeer and Stern 2018, arXiv:1804.04235.
    Lion: Chen et al. 2023, arXiv:2302.06675.
    Muon: Jordan et al. 2024; its scale as in Liu et al. 2025, arXiv:2502.16982, section 2.2.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import DTypeLike
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from models.matrices import MATRICES, is_norm_or_bias
from train.config.sections import OptimConfig
from train.step.adam8bit import scale_by_adam8bit
from train.step.lr_schedule import schedule
from train.step.rounding import round_weights

MUON_RMS = 0.2
"""Root mean square of Muon's updates: that of Adam's, so that both share a learning rate."""


def optimizer(
    config: OptimConfig, lr: float, steps: int, *, param_dtype: DTypeLike = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """Build the whole update rule.

    Args:
        config: optimizer, decay rates, clipping and schedule.
        lr: peak learning rate.
        steps: optimizer steps of the whole run.
        param_dtype: of the weights; bfloat16 weights are rounded stochastically.

    Returns:
        An optax transformation over trees of weights and float32 gradients. Updates are float32.
        For a part of the weights, `update` takes the `norm` of all gradients and the `place` of the
        part (`train.step.rounding.Place`).
    """
    rule = optax.chain(
        _clip_by_global_norm(config.clip),
        optax.chain(
            _direction(config),
            optax.add_decayed_weights(config.weight_decay, decayed),
            optax.scale_by_learning_rate(schedule(config, lr, steps)),
        ),
    )
    if jnp.dtype(param_dtype) == jnp.bfloat16:
        rule = optax.chain(rule, round_weights())

    def as_float32(params):
        return jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def init(params):
        return rule.init(as_float32(params))

    def update(updates, state, params=None, **extra):
        # optax mixes Python floats with int32 counts: legal, but not under strict promotion
        with jax.numpy_dtype_promotion("standard"):
            return rule.update(updates, state, as_float32(params), **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _clip_by_global_norm(longest: float) -> optax.GradientTransformationExtraArgs:
    """Clip as `optax.clip_by_global_norm`, by the norm of all gradients where it is given."""

    def update(updates, state, params=None, *, norm=None, **_):
        norm = optax.tree.norm(updates) if norm is None else norm
        clipped = jax.tree.map(
            lambda u: jnp.where(norm < longest, u, u / norm.astype(u.dtype) * longest), updates
        )
        return clipped, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def decayed(params):
    """Return a tree of flags: True for parameters with weight decay, all but norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda p, _: not is_norm_or_bias(_name(p)), params)


def _direction(config: OptimConfig) -> optax.GradientTransformation:
    """Return the update direction at a learning rate of 1, before weight decay."""
    b1, b2 = config.rates
    if config.name == "adamw":
        if config.moment_dtype == "fp32":
            return optax.scale_by_adam(b1, b2)
        return _on_whole_arrays(
            scale_by_adam8bit(b1, b2, moment_dtype=config.moment_dtype, low_bit=decayed)
        )
    if config.name == "lion":
        return optax.scale_by_lion(b1, b2)
    if config.name == "adafactor":
        return _on_whole_arrays(
            optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        )
    return _on_whole_arrays(_muon(b1, b2))


def _muon(b1: float, b2: float) -> optax.GradientTransformation:
    """Return Muon for the matrices of the blocks, Adam for embedding, output matrix and norms."""

    def dimensions(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: MuonDimensionNumbers(*MATRICES[_name(path)]), params
        )

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if _name(path) in MATRICES else "adam", params
        )

    def to_rms_of_adam(updates, state, params=None):
        def scaled(path, u):
            inputs, output = MATRICES[_name(path)]
            longer = max(math.prod(u.shape[axis] for axis in inputs), u.shape[output])
            return u * (MUON_RMS * longer**0.5)

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    matrices = optax.chain(
        scale_by_muon(weight_dimension_numbers=dimensions),
        optax.GradientTransformation(optax.init_empty_state, to_rms_of_adam),
    )
    return optax.partition({"muon": matrices, "adam": optax.scale_by_adam(b1, b2)}, labels)


def _on_whole_arrays(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run a rule that mixes the elements of an array while the array is sharded.

    The compiler adds the communication; results have the shardings of the arguments.
    """
    rule = optax.with_extra_args_support(rule)

    def with_extra(updates, state, params, extra):
        return rule.update(updates, state, params, **extra)

    def update(updates, state, params=None, **extra):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return rule.update(updates, state, params, **extra)

        def place(x):
            sharding = jax.typeof(x).sharding
            return NamedSharding(mesh, P() if sharding.mesh.empty else sharding.spec)

        out = jax.tree.map(place, (updates, state))
        return jax.sharding.auto_axes(out_sharding=out)(with_extra)(updates, state, params, extra)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _name(path) -> str:
    return str(getattr(path[-1], "key", path[-1]))
