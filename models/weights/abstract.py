"""Models without arrays, to be filled with the arrays of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxattn.device import default_device
from models import sharding
from models.config import ModelConfig
from models.execution import TRAINING, Execution
from models.internlm2 import InternLM2
from models.weights.table import find_param, table


def abstract(
    config: ModelConfig,
    execution: Execution = TRAINING,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> InternLM2:
    """Build a model with a ShapeDtypeStruct, sharding included, in place of every array.

    Without a mesh, the arrays are on the default device.

    Raises:
      ValueError: the mesh does not divide the model.
    """
    model = jax.eval_shape(lambda: InternLM2(config, rngs=nnx.Rngs(0), execution=execution))
    if mesh is None:
        places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(default_device()), model)
    else:
        places = sharding.shardings(model, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model, places
    )


def fill(model: InternLM2, values: Mapping[str, jax.Array]) -> InternLM2:
    """Replace the arrays of the parameters with these paths, and return the model."""
    for path, value in values.items():
        owner, name = find_param(model, path)
        setattr(owner, name, getattr(owner, name).replace(value))
    return model


def named_params(model: InternLM2) -> Mapping[str, Any]:
    """Return the array (or ShapeDtypeStruct) of every parameter by its path."""
    named = {}
    for weight in table(model.config):
        owner, name = find_param(model, weight.path)
        named[weight.path] = getattr(owner, name).get_value()
    return named
