"""Stores that say which thread writes what, for where Pallas' own are slower."""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from jaxattn.pallas.softmax import TILE
from jaxattn.pallas.sync import swizzled

utils = mgpu.utils


def store_factor(ref, value) -> None:
    """Stores a tile that is a left factor of wgmma in registers, as it lies there.

    The four registers that hold 16 x 16 numbers of a warp are four matrices of 8 x 8, and stmatrix
    stores these at once. Pallas' own store moves numbers between registers first: 30 instructions
    more for 64 x 64, and as many registers in the tightest place of the backward kernel.

    Args:
      ref: [64, columns] in shared memory, of 2-byte numbers, laid out by `swizzled`; columns a
        multiple of 64.
      value: the same shape and type, in the layout TILE.

    References:
      PTX ISA, stmatrix and the register fragments of wgmma.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(value.dtype)), TILE))
    def store(_, ref: Any, value: Any) -> None:
        rows, columns = value.shape
        i32 = ir.IntegerType.get_signless(32)

        def constant(x: int):
            return arith.constant(i32, x)

        registers = [utils.bitcast(x, i32) for x in value.registers.flat]
        thread = arith.andi(utils.thread_idx(), constant(127))
        warp, lane = arith.shrui(thread, constant(5)), arith.andi(thread, constant(31))
        # Each lane gives the address of a row of 16 bytes: 8 lanes those of a matrix, of which the
        # first two lie below each other, the others right of these.
        row, matrix = arith.andi(lane, constant(7)), arith.shrui(lane, constant(3))
        below, right = arith.andi(matrix, constant(1)), arith.shrui(matrix, constant(1))
        # Bytes: 1,024 a block of 8 rows of 64 columns, row by row of blocks; 128 a row, its pieces
        # of 16 exchanged by the row's number (the swizzle).
        blocks = columns // 64
        offset = arith.addi(
            arith.muli(arith.addi(arith.muli(warp, constant(2)), below), constant(1024 * blocks)),
            arith.addi(
                arith.muli(row, constant(128)),
                arith.muli(arith.xori(row, right), constant(16)),
            ),
        )
        base, i8 = utils.memref_ptr(ref), ir.IntegerType.get_signless(8)
        for i in range(len(registers) // 4):
            block, pair = divmod(i, 4)  # 16 columns are two pieces
            at = arith.xori(offset, constant(32 * pair))
            at = utils.getelementptr(utils.getelementptr(base, [at], i8), [block * 1024], i8)
            utils.inline_ptx(
                "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
                at,
                *registers[4 * i : 4 * i + 4],
                has_side_effects=True,
            )

    store(ref, value)  # pyright: ignore[reportCallIssue]  (its context comes from Pallas)
