"""What loading and converting need of the host's memory, and what a process has taken of it."""

import math
from pathlib import Path

import jax.numpy as jnp
import psutil

from models.config import ModelConfig
from models.weights.abstract import abstract, named_params
from models.weights.table import hf_tensors

_STATUS = Path("/proc/self/status")


def largest_parameter_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the largest parameter, all layers of it: w1, w2, w3, or a table of embeddings."""
    shapes = (p.shape for p in named_params(abstract(config, mesh=None, dtype=dtype)).values())
    return max(math.prod(shape) for shape in shapes) * jnp.dtype(dtype).itemsize


def largest_tensor_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the largest tensor of a HF checkpoint, which holds each layer's apart."""
    shapes = (weight.hf_shape(config) for _, weight, _ in hf_tensors(config))
    return max(math.prod(shape) for shape in shapes) * jnp.dtype(dtype).itemsize


def check_memory(config: ModelConfig, dtype: str) -> None:
    """Check that a conversion fits into the free memory, before it begins.

    Three times: the parameter, what orbax makes of it to compress it or from what it has read, and
    tensors on their way (measured: 2.6 to 2.7).

    Raises:
      MemoryError: it does not.
    """
    need, free = 3 * largest_parameter_bytes(config, dtype), available()
    if need > free:
        raise MemoryError(
            f"converting needs {need / 1e9:.1f} GB of memory (three times the largest parameter "
            f"of all {config.num_layers} layers, in {dtype}), {free / 1e9:.1f} GB are free: use a "
            "machine with more"
        )


def available() -> int:
    """Return the bytes of memory that programs can still take without swapping."""
    return psutil.virtual_memory().available


def resident() -> int:
    """Return the memory (resident set) of this process in bytes."""
    return psutil.Process().memory_info().rss


def peak() -> int | None:
    """Return the largest resident set that this process ever had, in bytes; None without /proc.

    psutil has no such figure on Linux, and `getrusage` starts with the parent's. Mapped files
    count as far as they were read, though the kernel can take these pages away at any time.
    """
    if not _STATUS.exists():
        return None
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0]) if "VmHWM" in fields else None
