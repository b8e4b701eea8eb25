"""Shared-memory layout and ring slots, shared by the kernels."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax


def swizzled(dtype) -> tuple:
    """Return the layout of a tile in shared memory that TMA writes and wgmma reads.

    8 rows of 128 bytes, whose 16-byte pieces are permuted so that no two rows share a bank.
    """
    minor = 128 // jnp.dtype(dtype).itemsize
    # pyright takes jax's own classes for abstract ones.
    return plgpu.TilingTransform((8, minor)), plgpu.SwizzleTransform(128)  # pyright: ignore


def ring_slot(i, slots: int):
    """Return the slot of the i-th tile in a ring of stages, i from 0.

    A bit mask where possible: the remainder of a number that may be negative takes four
    instructions, and registers that the backward kernel lacks (it spilled 20 to 40 times a tile).
    """
    if slots & (slots - 1) == 0:
        return i & (slots - 1)
    return lax.rem(i, jnp.int32(slots))
