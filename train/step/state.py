"""Train state: step number, weights, optimizer state and skip-step guard, as one pytree.

Weights are a nested dict of arrays instead of a module: a checkpoint can be read without the
module's class, and optax sees only arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.lora import LoRAParam
from models.sharding import shardings
from train.step.guard import Guard, new_guard

Params = dict[str, Any]
"""Nested dict of arrays, with the parameter names of the model."""


class TrainState(NamedTuple):
    """State of training between two steps, or the same tree of structs or shardings.

    Attributes:
        step: int32 scalar, batches done, skipped ones included.
        params: in their storage type, with the shardings of `models.sharding`.
        opt_state: moments, sharded like their parameters.
        guard: scalars, see `train.step.guard`.
        frozen: weights that are not trained, beside adapters; None: all are trained. They are
            part of no checkpoint.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    guard: Guard
    frozen: Params | None = None

    @property
    def weights(self) -> Params:
        """All weights of the model, trained and frozen."""
        return merge_params(self.params, self.frozen)

    @property
    def mesh(self) -> Mesh:
        """Mesh of the devices that hold the state."""
        sharding = self.step.sharding
        assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
        return sharding.mesh


def abstract_state(
    make_model: Callable[[], nnx.Module], tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Return the structure of the train state, for compilation and for restoring checkpoints.

    Args:
        make_model: builds the model; traced, so that nothing is allocated.
        tx: the optimizer.
        mesh: the devices.

    Returns:
        (graphdef, the model without parameters for `nnx.merge`; ShapeDtypeStructs with shardings).

    Raises:
        ValueError: the mesh does not divide the model's weights.
    """
    model = jax.eval_shape(make_model)
    graphdef = nnx.graphdef(model)
    params, frozen = (
        jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            nnx.to_pure_dict(weights),
            nnx.to_pure_dict(shardings(weights, mesh)),
        )
        for weights in _trained_and_frozen(model)
    )

    def on_mesh(a) -> jax.ShapeDtypeStruct:
        spec = a.sharding.spec if a.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        state = jax.tree.map(on_mesh, jax.eval_shape(_initial(tx), params))
    return graphdef, state._replace(frozen=frozen or None)


def new_state(params: Params, tx: optax.GradientTransformation, like: TrainState) -> TrainState:
    """Return the state before the first step.

    Args:
        params: all weights, sharded; donated.
        tx: the optimizer.
        like: from `abstract_state`.
    """
    shardings_of_state = jax.tree.map(lambda a: a.sharding, like._replace(frozen=None))
    with jax.set_mesh(like.mesh):
        initial = jax.jit(_initial(tx), donate_argnums=0, out_shardings=shardings_of_state)
        state = initial(_select(params, like.params))
    return state._replace(frozen=new_frozen(params, like))


def new_frozen(params: Params, like: TrainState) -> Params | None:
    """Return the frozen ones of all weights; None if there are none."""
    return None if like.frozen is None else _select(params, like.frozen)


def params_of(model: nnx.Module, like: TrainState) -> Params:
    """Return the weights of a model in the dtypes and shardings of `like`, for `new_state`.

    Weights that have them already are not copied.
    """
    with jax.set_mesh(like.mesh):
        return jax.tree.map(
            lambda a, to: jax.device_put(a.astype(to.dtype), to.sharding),
            nnx.to_pure_dict(nnx.state(model)),
            like.weights,
        )


def merge_params(params: Params, frozen: Params | None) -> Params:
    """Merge the nested dicts of trained and of frozen weights."""
    merged = dict(frozen or {})
    for name, value in params.items():
        merged[name] = merge_params(value, merged.get(name)) if isinstance(value, dict) else value
    return merged


def _select(weights: Params, like: Params) -> Params:
    """Return the part of nested dicts that `like` has, too."""
    return {
        name: _select(weights[name], value) if isinstance(value, dict) else weights[name]
        for name, value in like.items()
    }


def _trained_and_frozen(model: nnx.Module) -> tuple[Any, Any]:
    """Split the weights of a model: with adapters, these are the trained ones."""
    weights = nnx.state(model)
    adapters, frozen = nnx.split_state(weights, LoRAParam, ...)
    return (adapters, frozen) if adapters else (weights, nnx.State({}))


def _initial(tx: optax.GradientTransformation) -> Callable[[Params], TrainState]:
    """Return a function from parameters to the state before the first step."""
    return lambda params: TrainState(
        step=jnp.int32(0), params=params, opt_state=tx.init(params), guard=new_guard()
    )
