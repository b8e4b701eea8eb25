"""Losses by source: the sums that belong to each training file of a mixture.

B row, T position, S source.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer


def sum_by_source(
    values: Float[Array, "*batch"] | None,
    sources: Integer[np.ndarray | Array, "*batch"] | None,
    count: int,
) -> Float[Array, " S"]:
    """Sum values by the source of their position.

    Args:
        values: float32, 0 where a position does not count; may be None without sources.
        sources: index of each position's source; None: the data are of one source.
        count: S.

    Returns:
        float32, replicated; empty without sources.
    """
    if sources is None or values is None:
        return jnp.zeros(0, jnp.float32)
    # A comparison with every source instead of a scatter: XLA fuses it into one reduction.
    ids_S = jnp.arange(count, dtype=sources.dtype).reshape((1,) * sources.ndim + (count,))
    hits = jnp.where(sources[..., None] == ids_S, values[..., None], 0.0)
    return jnp.sum(hits, axis=tuple(range(sources.ndim)))
