"""Set up jax for training: share of the GPU's memory, compilation cache, compiler options."""

import os

import jax

from jaxattn.device import GiB, host_memory
from jaxattn.errors import first_line
from train.cache_dirs import compilation_cache

SHARE = 0.92
"""Share of a GPU's memory that jax allocates; jax's default is 0.75. A training run has the GPU to
itself, except for the allocations of CUDA libraries."""

HOST_SHARE = 0.8
"""Share of main memory that remat may take for values in host memory."""


def set_up(*, keep_compiled: bool) -> None:
    """Set the memory shares and the compilation cache, before jax looks at its devices.

    With `keep_compiled`, compiled programs are stored in `compilation_cache()`, unless
    JAX_COMPILATION_CACHE_DIR names another directory. On a GPU only: for a CPU the cache saves
    little, and code compiled for one CPU may not run on the next.

    Raises:
        ValueError: jax finds no device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(SHARE))
    # XLA's own limit is 64 GiB, whatever the machine has. Some more than remat takes: the memory
    # is also used for copies of batches and weights.
    pinned = int(HOST_SHARE * host_memory() / GiB) + 2
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(pinned))
    try:
        on_gpu = jax.default_backend() == "gpu"
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"jax finds no device for JAX_PLATFORMS={platforms}: unset it, or take cpu or cuda "
            f"({first_line(error)})"
        ) from error
    if keep_compiled and on_gpu and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache()))


def compiler_options(
    *, deterministic: bool, matmul: str = "bf16", remat: str = "full"
) -> dict[str, bool | int] | None:
    """Return XLA options for `jax.jit` and `Lowered.compile`; None: XLA's defaults."""
    options: dict[str, bool | int] = {}
    if deterministic:
        # The same bits in every run on GPUs of one kind: no atomic additions (the embedding's
        # gradient has them otherwise), and matrix products chosen by rule instead of by timing.
        options["xla_gpu_deterministic_ops"] = True
    if matmul == "fp8":
        # All matrix products to cuBLAS. XLA would put each into a Triton fusion, together with the
        # transposition of its 8-bit operands, which cuBLAS needs in memory.
        options["xla_gpu_enable_triton_gemm"] = False
    if "offload" in remat:
        # XLA counts host memory as memory of the GPU, and recomputes values in vain (jax 0.12.0).
        options["xla_gpu_memory_limit_slop_factor"] = 1000
    return options or None
