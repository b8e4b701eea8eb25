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
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    guard: Guard

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
    graphdef, weights = nnx.split(jax.eval_shape(make_model))
    params = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        nnx.to_pure_dict(weights),
        nnx.to_pure_dict(shardings(weights, mesh)),
    )

    def on_mesh(a) -> jax.ShapeDtypeStruct:
        spec = a.sharding.spec if a.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return graphdef, jax.tree.map(on_mesh, jax.eval_shape(_initial(tx), params))


def new_state(params: Params, tx: optax.GradientTransformation, like: TrainState) -> TrainState:
    """Return the state before the first step.

    Args:
        params: sharded; donated.
        tx: the optimizer.
        like: from `abstract_state`.
    """
    shardings_of_state = jax.tree.map(lambda a: a.sharding, like)
    with jax.set_mesh(like.mesh):
        return jax.jit(_initial(tx), donate_argnums=0, out_shardings=shardings_of_state)(params)


def params_of(model: nnx.Module, like: TrainState) -> Params:
    """Return the weights of a model in the dtypes and shardings of `like`, for `new_state`.

    Weights that have them already are not copied.
    """
    with jax.set_mesh(like.mesh):
        return jax.tree.map(
            lambda a, to: jax.device_put(a.astype(to.dtype), to.sharding),
            nnx.to_pure_dict(nnx.state(model)),
            like.params,
        )


def _initial(tx: optax.GradientTransformation) -> Callable[[Params], TrainState]:
    """Return a function from parameters to the state before the first step."""
    return lambda params: TrainState(
        step=jnp.int32(0), params=params, opt_state=tx.init(params), guard=new_guard()
    )
