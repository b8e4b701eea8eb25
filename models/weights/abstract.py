"""A model without its arrays, to be filled with those of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxattn.device import default_device
from models import sharding
from models.config import ModelConfig
from models.internlm2 import InternLM2
from models.weights.table import resolve, table


def abstract(
    config: ModelConfig,
    *,
    mesh: Mesh | AbstractMesh | None,
    dtype: Any,
    param_dtype: Any = None,
    attn: str = "auto",
    remat: str = "full",
) -> InternLM2:
    """The model with a ShapeDtypeStruct that knows its sharding in place of every array."""
    param_dtype = jnp.dtype(dtype if param_dtype is None else param_dtype)
    model = jax.eval_shape(
        lambda: InternLM2(
            config, rngs=nnx.Rngs(0), attn=attn, dtype=dtype, param_dtype=param_dtype, remat=remat
        )
    )
    if mesh is None:
        places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(default_device()), model)
    else:
        places = sharding.shardings(model, mesh)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model, places
    )


def fill(model: InternLM2, values: Mapping[str, jax.Array]) -> InternLM2:
    """The model with its parameters replaced, by path."""
    for path, value in values.items():
        owner, name = resolve(model, path)
        setattr(owner, name, getattr(owner, name).replace(value))
    return model


def named_params(model: InternLM2) -> Mapping[str, Any]:
    """Every parameter's array (or ShapeDtypeStruct) by its path."""
    named = {}
    for weight in table(model.config):
        owner, name = resolve(model, weight.path)
        named[weight.path] = getattr(owner, name).get_value()
    return named
