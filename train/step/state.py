"""What a step changes: step number, weights, optimizer, guard. One pytree, donated.

Weights are a nested dict of arrays and not the module, so that a checkpoint can be read without
the module's class, and optax sees nothing but arrays.
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
"""Nested dict of arrays, named as in the model."""


class TrainState(NamedTuple):
    """State of training between two steps, or the same tree of structs or shardings.

    Attributes:
        step: int32 scalar, batches done; those that were skipped count too.
        params: in the type they are stored in, sharded as `models.sharding` says.
        opt_state: moments, sharded as their parameters.
        guard: scalars, see `train.step.guard`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    guard: Guard

    @property
    def mesh(self) -> Mesh:
        """The devices that hold it."""
        sharding = self.step.sharding
        assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
        return sharding.mesh


def abstract_state(
    make_model: Callable[[], nnx.Module], tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """The state without its numbers: what is compiled for, and what a checkpoint is restored into.

    Args:
        make_model: builds the model; traced, so nothing is allocated.
        tx: the optimizer.
        mesh: the devices.

    Returns:
        (the model without parameters, to `nnx.merge` with them; ShapeDtypeStructs with shardings).

    Raises:
        ValueError: if the mesh does not divide the model's weights.
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
        return graphdef, jax.tree.map(on_mesh, jax.eval_shape(_beginning(tx), params))


def new_state(params: Params, tx: optax.GradientTransformation, like: TrainState) -> TrainState:
    """The state before the first step.

    Args:
        params: sharded; consumed.
        tx: the optimizer.
        like: from `abstract_state`.
    """
    where = jax.tree.map(lambda a: a.sharding, like)
    with jax.set_mesh(like.mesh):
        return jax.jit(_beginning(tx), donate_argnums=0, out_shardings=where)(params)


def params_of(model: nnx.Module, like: TrainState) -> Params:
    """The weights of a model as `new_state` takes them: of the type and where `like` wants them.

    Weights that are so already are not copied.
    """
    with jax.set_mesh(like.mesh):
        return jax.tree.map(
            lambda a, to: jax.device_put(a.astype(to.dtype), to.sharding),
            nnx.to_pure_dict(nnx.state(model)),
            like.params,
        )


def _beginning(tx: optax.GradientTransformation) -> Callable[[Params], TrainState]:
    """Makes parameters -> the state before the first step."""
    return lambda params: TrainState(
        step=jnp.int32(0), params=params, opt_state=tx.init(params), guard=new_guard()
    )
