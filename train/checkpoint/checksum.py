"""One number for all bits of a state, so that a flipped one on a disk is found.

Orbax notices files that are cut or missing, but not a wrong number inside an array.
"""

from typing import Any

import jax
import jax.numpy as jnp

from train.step.state import TrainState


def checksum(state: TrainState) -> int:
    """A sum of all arrays' bits, modulo 2^32; the same on any mesh, as integer sums are exact."""
    with jax.set_mesh(state.mesh):
        return int(jax.device_get(_checksum(state)))


@jax.jit
def _checksum(state: Any) -> jax.Array:
    total = jnp.uint32(0)
    for n, a in enumerate(jax.tree.leaves(state)):
        bits = jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}"))
        # An odd factor for each array: two that have changed places differ.
        total += jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32) * jnp.uint32(2 * n + 1)
    return total
