"""Small facts about moving data on Hopper, shared by the kernels."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax


def swizzled(dtype) -> tuple:
    """Layout of a tile in shared memory that the copy engine writes and wgmma reads.

    8 rows of 128 bytes, whose 16-byte pieces are permuted so that no two rows meet in a bank.
    """
    minor = 128 // jnp.dtype(dtype).itemsize
    # pyright takes jax's own classes for abstract ones.
    return plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(128)  # pyright: ignore


def ring_slot(i, slots: int):
    """Slot of the i-th tile in a ring of stages."""
    return lax.rem(i, jnp.int32(slots))
