"""FlashAttention-3's own CUDA kernels, called from JAX by the package dew-flash-attn-cu13.

B batch, T tokens, N query heads, K kv heads, H head dim. The package is no dependency: only the
bench's cells of "fa3" import it.
"""

import importlib.metadata
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from jaxattn.bench.shapes import Shape, document_lengths

PACKAGE = "dew-flash-attn-cu13"

Attend = Callable[[Array, Array, Array], Array]
"""(q [B, T, N, H], k, v [B, T, K, H]) -> o [B, T, N, H]."""


def attention(shape: Shape) -> Attend:
    """Return causal attention with the mask of a shape; documents use the variable-length kernels.

    Raises:
      ImportError: the package is not installed.
    """
    from dew_flash_attn import (  # pyright: ignore[reportMissingImports]
        flash_mha,
        flash_mha_varlen,
    )

    settings: dict = {"is_causal": True}
    if shape.window is not None:
        settings["window_size"] = (shape.window - 1, 0)
    if shape.documents is None:
        return lambda q, k, v: flash_mha(q, k, v, **settings)
    lengths = document_lengths(shape.length, *shape.documents) * shape.batch
    ends = jnp.cumsum(jnp.array([0, *lengths], jnp.int32), dtype=jnp.int32)

    def packed(q: Array, k: Array, v: Array) -> Array:
        rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        return flash_mha_varlen(*rows, ends, max(lengths), **settings).reshape(q.shape)

    return packed


def version() -> str:
    """Return name and version of the package."""
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
