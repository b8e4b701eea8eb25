"""Optimizers from optax: clip the gradient, take a direction, decay weights, scale by the rate.

References:
    AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    Adafactor: Shazeer and Stern 2018, arXiv:1804.04235.
    Lion: Chen et al. 2023, arXiv:2302.06675.
    Muon: Jordan et al. 2024; its scale as in Liu et al. 2025, arXiv:2502.16982, section 2.2.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import DTypeLike
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from train.config.sections import OptimConfig
from train.step.adam8bit import scale_by_adam8bit
from train.step.lr_schedule import schedule
from train.step.rounding import round_weights

MATRICES = {
    "wqkv_DKgH": MuonDimensionNumbers(-4, -1),  # every head of q, k, v is a matrix of its own
    "wo_NHD": MuonDimensionNumbers((-3, -2), -1),
    "w1_DF": MuonDimensionNumbers(-2, -1),
    "w3_DF": MuonDimensionNumbers(-2, -1),
    "w2_FD": MuonDimensionNumbers(-2, -1),
}
"""What Muon makes orthogonal: dimensions that the input has, and the output. Other dimensions,
such as layers, count matrices. Everything else (embedding, output matrix, norms) is Adam's."""

MUON_RMS = 0.2
"""Root mean square of Muon's updates: Adam's usual one, so that both share a learning rate."""


def optimizer(
    config: OptimConfig, lr: float, steps: int, *, param_dtype: DTypeLike = jnp.float32
) -> optax.GradientTransformation:
    """The whole update rule.

    Args:
        config: which, its rates, and the schedule.
        lr: the peak learning rate.
        steps: of the whole run.
        param_dtype: of the weights; in bfloat16 they are rounded stochastically.

    Returns:
        An optax transformation over trees of weights and float32 gradients. Updates are float32.
    """
    rule = optax.chain(
        optax.clip_by_global_norm(config.clip),
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

    def update(updates, state, params=None):
        with _promotion_of_optax():
            return rule.update(updates, state, as_float32(params))

    return optax.GradientTransformation(init, update)


def decayed(params):
    """Which parameters weight decay pulls on: all but norms and biases, told by their names."""

    def is_matrix(path, _):
        return "norm" not in _name(path) and "bias" not in _name(path)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _direction(config: OptimConfig) -> optax.GradientTransformation:
    """Where to go for a rate of 1, before weight decay."""
    b1, b2 = config.rates
    if config.name == "adamw":
        if config.moment_dtype == "fp32":
            return optax.scale_by_adam(b1, b2)
        return _whole(scale_by_adam8bit(b1, b2, moment_dtype=config.moment_dtype, compact=decayed))
    if config.name == "lion":
        return optax.scale_by_lion(b1, b2)
    if config.name == "adafactor":
        return _whole(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)))
    return _whole(_muon(b1, b2))


def _muon(b1: float, b2: float) -> optax.GradientTransformation:
    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: MATRICES[_name(path)], params)

    def labels(params):
        def label(path, _):
            return "muon" if _name(path) in MATRICES else "adam"

        return jax.tree_util.tree_map_with_path(label, params)

    def to_adams_size(updates, state, params=None):
        def scaled(path, u):
            dims = MATRICES[_name(path)]
            sides = [_size(u, dims.reduction_axis), _size(u, dims.output_axis)]
            return u * (MUON_RMS * max(sides) ** 0.5)

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    of_matrices = optax.chain(
        scale_by_muon(weight_dimension_numbers=matrices),
        optax.GradientTransformation(optax.init_empty_state, to_adams_size),
    )
    return optax.partition({"muon": of_matrices, "adam": optax.scale_by_adam(b1, b2)}, labels)


def _size(u: jax.Array, axes) -> int:
    of_axes = (axes,) if isinstance(axes, int) else axes
    return functools.reduce(lambda n, axis: n * u.shape[axis], of_axes, 1)


def _whole(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule that looks across the elements of an array, over which devices it may be split.

    Where its parts come together is the compiler's business; results lie where the arguments do.
    """

    def update(updates, state, params=None):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return rule.update(updates, state, params)

        def place(x):
            sharding = jax.typeof(x).sharding
            return NamedSharding(mesh, P() if sharding.mesh.empty else sharding.spec)

        out = jax.tree.map(place, (updates, state))
        return jax.sharding.auto_axes(out_sharding=out)(rule.update)(updates, state, params)

    return optax.GradientTransformation(rule.init, update)


def _name(path) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def _promotion_of_optax():
    """Optax mixes Python floats with int32 counts, and ranks: legal, but not in strict mode."""
    return jax.numpy_dtype_promotion("standard")
