"""MLIR helpers for code per thread: constants, warps of a product, pointers."""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm

utils: Any = mgpu.utils
# Layout of a scalar argument of `plgpu.inline_mgpu`.
SCALAR = plgpu.Layout.WG_SPLAT
# Threads of a warpgroup.
THREADS = 128


def int32(x):
    """Convert a traced or constant index to a scalar argument of `plgpu.inline_mgpu`."""
    return jnp.asarray(x, jnp.int32)


def constant(x: int, bits: int = 32) -> Any:
    """Return an integer constant."""
    return arith.constant(ir.IntegerType.get_signless(bits), x)


def scaled(x, factor: int) -> Any:
    """Return a 32-bit integer times a constant."""
    return arith.muli(x, constant(factor))


def wide(x) -> Any:
    """Return a 32-bit integer in 64 bits."""
    return arith.extsi(ir.IntegerType.get_signless(64), x)


def lane() -> Any:
    """Return the thread's index in its warp."""
    return arith.andi(utils.thread_idx(), constant(31))


def warpgroup() -> Any:
    """Return the index of the thread's warpgroup."""
    return arith.shrui(utils.thread_idx(), constant(7))


def warp_coordinates(m_warps: int) -> tuple[Any, Any]:
    """Return the warp's index along the rows of its warpgroup's product, and along the columns."""
    warp = arith.andi(arith.shrui(utils.thread_idx(), constant(5)), constant(3))
    if m_warps == 4:
        return warp, constant(0)
    n_warps = constant(4 // m_warps)
    return arith.divui(warp, n_warps), arith.remui(warp, n_warps)


def shifted(pointer, offset) -> Any:
    """Return a pointer moved by a number of bytes, an int or a value."""
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def shared_pointer(ref) -> Any:
    """Return the address of a ref in shared memory."""
    return utils.memref_ptr(ref)


def global_pointer(ref) -> Any:
    """Return the address of a ref in global memory."""
    pointer = utils.memref_ptr(ref)
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), pointer)


def shape(ref) -> list[int]:
    """Return the shape of a ref, tiled as in memory."""
    return ir.MemRefType(ref.type).shape


def tile_strides(ref) -> tuple[int, int]:
    """Return the bytes from 8 rows to the next 8, and from 64 columns to the next 64.

    Args:
      ref: 16-bit numbers in shared memory in the layout `smem.swizzled`.
    """
    (rows, columns, *_), _ = ref.type.get_strides_and_offset()
    return 2 * rows, 2 * columns
