"""What loading and converting need of the host's memory, and what a process has taken of it."""

import math
from pathlib import Path

import jax.numpy as jnp

from models.config import ModelConfig
from models.weights.abstract import abstract, named_params
from models.weights.table import hf_tensors

_STATUS, _MACHINE = Path("/proc/self/status"), Path("/proc/meminfo")  # Linux alone has them


def largest_parameter_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the largest parameter, all layers of it: w1, w2, w3, or a table of embeddings."""
    shapes = (p.shape for p in named_params(abstract(config, mesh=None, dtype=dtype)).values())
    return max(math.prod(shape) for shape in shapes) * jnp.dtype(dtype).itemsize


def largest_tensor_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the largest tensor of a HF checkpoint, which holds each layer's apart."""
    shapes = (weight.hf_shape(config) for _, weight, _ in hf_tensors(config))
    return max(math.prod(shape) for shape in shapes) * jnp.dtype(dtype).itemsize


def check_memory(config: ModelConfig, dtype: str) -> None:
    """Checks that a conversion fits, before it begins; where nobody can say, that it does.

    Three times: the parameter, what orbax makes of it to compress it or from what it has read, and
    tensors on their way (measured: 2.6 to 2.7).

    Raises:
      MemoryError: it does not.
    """
    need, free = 3 * largest_parameter_bytes(config, dtype), available()
    if free is not None and need > free:
        raise MemoryError(
            f"converting needs {need / 1e9:.1f} GB of memory (three times the largest parameter "
            f"of all {config.num_layers} layers, in {dtype}), {free / 1e9:.1f} GB are free: use a "
            "machine with more"
        )


def available() -> int | None:
    """Bytes of memory that programs can still take without swapping; None: unknown."""
    return _field(_MACHINE, "MemAvailable")


def resident() -> int | None:
    """The memory that this process has now, in bytes; None: unknown."""
    return _field(_STATUS, "VmRSS")


def peak() -> int | None:
    """The most memory (resident set) that this process ever had, in bytes; None: unknown.

    Mapped files are in it as far as they have been looked at, though the kernel can take these
    pages away at any time.
    """
    return _field(_STATUS, "VmHWM")


def _field(file: Path, name: str) -> int | None:
    if not file.exists():
        return None
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    return None
