"""Host memory that loading and converting a checkpoint take."""

import math

import jax.numpy as jnp
import psutil

from models.config import ModelConfig
from models.execution import Execution
from models.weights.abstract import abstract, named_params
from models.weights.table import hf_tensors


def largest_tensor_bytes(config: ModelConfig, dtype: str) -> int:
    """Return the bytes of the largest tensor of a HF checkpoint, where layers are separate."""
    shapes = (weight.hf_shape(config) for _, weight, _ in hf_tensors(config))
    return max(math.prod(shape) for shape in shapes) * jnp.dtype(dtype).itemsize


def check_memory(config: ModelConfig, dtype: str) -> None:
    """Check before a conversion that the host has enough free memory.

    A conversion takes three times the largest parameter: the parameter, the copy that orbax
    compresses or has read, and tensors in flight (measured: 2.6 to 2.7 times).

    Raises:
      MemoryError: the host has less free memory.
    """
    parameters = named_params(abstract(config, Execution(param_dtype=dtype))).values()
    need = 3 * max(math.prod(p.shape) * p.dtype.itemsize for p in parameters)
    free = psutil.virtual_memory().available
    if need > free:
        raise MemoryError(
            f"converting needs {need / 1e9:.1f} GB of memory (three times the largest parameter "
            f"of all {config.num_layers} layers, in {dtype}), {free / 1e9:.1f} GB are free: use a "
            "machine with more memory"
        )
