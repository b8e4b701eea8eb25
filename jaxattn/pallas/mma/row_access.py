"""Accesses to global memory by the registers of a tile: a number per row, and atomic adds.

A tile has the tokens from `token` and the heads from `head` on, int32: the rows of the first head,
then the rows of the next. All of its rows are inside the array.
"""

from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float

from jaxattn.pallas.mma.fragments import acc_layout
from jaxattn.pallas.mma.lanes import (
    SCALAR,
    constant,
    global_pointer,
    int32,
    lane,
    scaled,
    shape,
    shifted,
    utils,
    warp_coordinates,
    warpgroup,
    wide,
)
from jaxattn.pallas.softmax import ROW


def load_by_row(source, token, head, *, rows: int, heads: int) -> jax.Array:
    """Load a number for each row of a tile from fp32 [N, R]: fp32 [rows] in the layout `ROW`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((rows,), source.dtype, layout=ROW),
    )
    def load(_, source: Any, token: Any, head: Any) -> Any:
        kind = ir.VectorType.get((1,), ir.F32Type.get())
        layout = ROW.to_mgpu()
        registers = np.empty(layout.registers_shape((rows,)), dtype=object)
        pointers = _row_pointers(source, token, head, rows, heads)
        registers.flat[:] = [llvm.load(kind, pointer) for pointer in pointers]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(source, int32(token), int32(head))  # pyright: ignore[reportCallIssue]


def store_by_row(target, value: jax.Array, token, head, *, heads: int) -> None:
    """Store a number for each row of a tile, fp32 [rows] in the layout `ROW`, in fp32 [N, R]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROW, SCALAR, SCALAR))
    def store(_, target: Any, value: Any, token: Any, head: Any) -> None:
        pointers = _row_pointers(target, token, head, value.shape[0], heads)
        for pointer, register in zip(pointers, value.registers.flat, strict=True):
            llvm.store(register, pointer)  # four threads store the same number

    store(target, value, int32(token), int32(head))  # pyright: ignore[reportCallIssue]


def add_rows(
    target,
    value,
    token,
    head,
    *,
    dtype,
    m_warps: int,
    vector: bool,
    column: int = 0,
    own: int = 0,
) -> None:
    """Add a tile to fp32 numbers in global memory, atomically.

    The numbers are stored in the order of a warp's threads, so that a warp adds to neighbors;
    `in_rows` restores the order of the rows.

    Args:
      target: fp32 [R / 8, N, 8 * H] in global memory.
      value: fp32 [rows, columns] in the layout `acc_layout(dtype, m_warps)`.
      token: first row, a multiple of 8, int32.
      head: head of the rows, int32.
      dtype: type of the factors of the product.
      m_warps: warps along the rows of the value.
      vector: add four numbers per instruction (sm_90 and later).
      column: first column, a multiple of 64.
      own: columns of a warpgroup, if several warpgroups share the rows; 0: one has all columns.

    References:
      PTX ISA, red.
    """
    layout = acc_layout(dtype, m_warps)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, SCALAR, SCALAR))
    def add(_, target: Any, value: Any, token: Any, head: Any) -> None:
        _, num_heads, numbers = shape(target)  # numbers of 8 rows of a head
        n_warps, block = 4 // m_warps, 4 * 64  # bytes of 8 rows x 8 columns
        m_warp, n_warp = warp_coordinates(m_warps)
        eight = arith.addi(arith.shrui(token.registers.item(), constant(3)), scaled(m_warp, 2))
        index = arith.addi(scaled(eight, num_heads), head.registers.item())
        # Of two neighboring blocks of the warp a thread has four numbers.
        warp_block, thread = (2 * block, 16) if vector else (block, 4)
        offset = arith.addi(scaled(lane(), thread), scaled(n_warp, warp_block))
        if own:
            offset = arith.addi(offset, scaled(warpgroup(), own // 8 * block))
        base = shifted(global_pointer(target), arith.muli(wide(index), constant(4 * numbers, 64)))
        base = shifted(shifted(base, offset), column // 8 * block)
        registers = value.registers.reshape(value.shape[0] // (16 * m_warps), -1, 2)

        def pointer(i: int, j: int, half: int):
            rows = 2 * m_warps * i + half
            return shifted(base, rows * num_heads * 4 * numbers + j * n_warps * block)

        def of_register(*index: int):
            return [llvm.extractelement(registers[index], constant(n)) for n in range(2)]

        for i, j, half in np.ndindex(registers.shape):
            if not vector:
                for n, number in enumerate(of_register(i, j, half)):
                    ptx = "red.relaxed.gpu.global.add.f32 [$0], $1;"
                    address = shifted(pointer(i, j, half), n * block // 2)
                    utils.inline_ptx(ptx, address, number, has_side_effects=True)
            elif j % 2 == 0:
                four = of_register(i, j, half) + of_register(i, j + 1, half)
                ptx = "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};"
                utils.inline_ptx(ptx, pointer(i, j, half), *four, has_side_effects=True)

    add(target, value, int32(token), int32(head))  # pyright: ignore[reportCallIssue]


def in_rows(
    sums: Float[Array, "eights N numbers"], head_dim: int, *, m_warps: int, vector: bool
) -> Float[Array, "R N H"]:
    """Return the sums of `add_rows`, [R / 8, N, 8 * H], in the order of their rows."""
    eights, num_heads, _ = sums.shape
    if vector:
        # Columns of a thread: pair of blocks, warp, block of the pair, thread of a row, number.
        n_warps = 4 // m_warps
        x = sums.reshape(eights, num_heads, head_dim // (16 * n_warps), n_warps, 8, 4, 2, 2)
        x = x.transpose(0, 4, 1, 2, 6, 3, 5, 7)
    else:  # in a block, the even columns of all threads, then the odd ones
        x = sums.reshape(eights, num_heads, head_dim // 8, 2, 8, 4)
        x = x.transpose(0, 4, 1, 2, 5, 3)
    return x.reshape(eights * 8, num_heads, head_dim)


def _row_pointers(ref, token, head, rows: int, heads: int):
    """Yield the address of the number of each of a thread's rows, in the order of `ROW`."""
    length = shape(ref)[1]
    token, head = token.registers.item(), head.registers.item()
    warp, _ = warp_coordinates(4)
    own = arith.shrui(lane(), constant(2))  # of 8 rows
    of_head = constant(rows // heads // 8)
    for i, half in np.ndindex(rows // 64, 2):
        eight = arith.addi(scaled(warp, 2), constant(8 * i + half))
        at_head = arith.addi(head, arith.divui(eight, of_head))
        at_token = arith.addi(arith.addi(token, own), scaled(arith.remui(eight, of_head), 8))
        index = arith.addi(arith.muli(wide(at_head), constant(length, 64)), wide(at_token))
        yield shifted(global_pointer(ref), arith.muli(index, constant(4, 64)))
