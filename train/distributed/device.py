"""Set up jax for training: share of the GPU's memory, compilation cache, compiler options."""

import os

import jax

from jaxattn.errors import first_line
from train.cache_dirs import compilation_cache

SHARE = 0.92
"""Share of a GPU's memory that jax allocates; jax's default is 0.75. A training run has the GPU to
itself, except for the allocations of CUDA libraries."""


def set_up(*, keep_compiled: bool) -> None:
    """Set the memory share and the compilation cache, before jax looks at its devices.

    Args:
        keep_compiled: Store compiled programs in `compilation_cache()`, unless
            JAX_COMPILATION_CACHE_DIR names another directory. On a GPU only: for a CPU the cache
            saves little, and code compiled for one CPU may not run on the next.

    Raises:
        ValueError: jax finds no device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(SHARE))
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


def compiler_options(*, deterministic: bool, matmul: str = "bf16") -> dict[str, bool] | None:
    """Return XLA options for `jax.jit` and `Lowered.compile`; None: XLA's defaults.

    Args:
        deterministic: Give the same bits in every run on GPUs of one kind: no atomic additions
            (the embedding's gradient has them otherwise), and matrix products chosen by rule
            instead of by timing.
        matmul: "fp8" leaves all matrix products to cuBLAS. By default XLA puts each product into a
            Triton fusion, together with the transposition of its 8-bit operands, which cuBLAS
            needs in memory.
    """
    options = {"xla_gpu_deterministic_ops": True} if deterministic else {}
    options |= {"xla_gpu_enable_triton_gemm": False} if matmul == "fp8" else {}
    return options or None
