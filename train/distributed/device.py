"""How jax takes the devices: said once, before it looks at them."""

import os
from pathlib import Path

import jax

SHARE = 0.92
"""Of a GPU's memory, what jax takes. By default it is 75%; a training run has the GPU to itself,
but for what CUDA libraries allocate beside it."""


def set_up(*, keep_compiled: bool) -> None:
    """Lets jax have nearly all of a GPU, and remember what it compiles for one.

    Args:
        keep_compiled: store compiled steps in ~/.cache/internlm2-jax (or $XDG_CACHE_HOME), unless
            JAX_COMPILATION_CACHE_DIR names another place. On a GPU only: for a CPU it saves little,
            and code compiled for one CPU may not run on the next.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(SHARE))
    on_gpu = jax.default_backend() == "gpu"
    if keep_compiled and on_gpu and jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "internlm2-jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def compiler_options(*, deterministic: bool) -> dict[str, bool] | None:
    """What XLA is asked for besides its defaults, for `jax.jit` and `Lowered.compile`.

    Args:
        deterministic: the same bits in every run on GPUs of one kind: no sum whose order is that in
            which programs finish (the embedding's gradient is one otherwise), and products chosen
            by rule instead of by timing.
    """
    return {"xla_gpu_deterministic_ops": True} if deterministic else None
