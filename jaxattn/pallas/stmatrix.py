"""Stores that say which thread writes what, for where Pallas' own are slower."""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from jaxattn.pallas.smem import swizzled
from jaxattn.pallas.softmax import TILE

utils = mgpu.utils


def store_transposed(ref, value) -> None:
    """Stores a tile's transpose in shared memory.

    The four registers that hold 16 x 16 numbers of a warp are four matrices of 8 x 8, and stmatrix
    stores these at once, transposed for nothing. Pallas' own store moves numbers between registers
    first: 30 instructions more for 64 x 64, and as many registers in the tightest place of the
    backward kernel.

    Args:
      ref: [rows, 64] in shared memory, of 2-byte numbers; all of an array laid out by `swizzled`,
        or 64 of its columns that start at a multiple of 64.
      value: [64, rows] in the layout TILE, of the same type; rows a multiple of 16.

    References:
      PTX ISA, stmatrix and the register fragments of wgmma.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(value.dtype)), TILE))
    def store(_, ref: Any, value: Any) -> None:
        rows = value.shape[1]
        (stride, *_), _ = ref.type.get_strides_and_offset()
        below_bytes = 2 * stride  # from 8 rows to the next 8
        i32 = ir.IntegerType.get_signless(32)

        def constant(x: int):
            return arith.constant(i32, x)

        registers = [utils.bitcast(x, i32) for x in value.registers.flat]
        thread = arith.andi(utils.thread_idx(), constant(127))
        warp, lane = arith.shrui(thread, constant(5)), arith.andi(thread, constant(31))
        # Each lane gives the address of a row of 16 bytes: 8 lanes those of a matrix. Of the four
        # the first two, which lie below each other in value, come to lie side by side.
        row, matrix = arith.andi(lane, constant(7)), arith.shrui(lane, constant(3))
        right, below = arith.andi(matrix, constant(1)), arith.shrui(matrix, constant(1))
        # 128 bytes a row, its pieces of 16 exchanged by the row's number (the swizzle).
        piece = arith.addi(arith.muli(warp, constant(2)), right)
        offset = arith.addi(
            arith.muli(below, constant(below_bytes)),
            arith.addi(
                arith.muli(row, constant(128)),
                arith.muli(arith.xori(row, piece), constant(16)),
            ),
        )
        base, i8 = utils.memref_ptr(ref), ir.IntegerType.get_signless(8)
        start = utils.getelementptr(base, [offset], i8)
        for i in range(rows // 16):
            utils.inline_ptx(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
                utils.getelementptr(start, [2 * i * below_bytes], i8),
                *registers[4 * i : 4 * i + 4],
                has_side_effects=True,
            )

    store(ref, value)  # pyright: ignore[reportCallIssue]  (its context comes from Pallas)
