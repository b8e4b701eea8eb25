"""Copies between global and shared memory by all threads of a program: cp.async, 16 bytes each.

cp.async exists on every GPU since Ampere. The copies of a thread between two calls of `commit` are
a group; groups complete in their order, and `wait` bounds the number of groups in flight. Other
threads' copies may still be in flight then: call `barrier` between `wait` and the first read.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf
from jaxlib.mlir.dialects import llvm, nvvm

from jaxattn.pallas.mma.lanes import (
    SCALAR,
    THREADS,
    constant,
    global_pointer,
    int32,
    scaled,
    shape,
    shared_pointer,
    shifted,
    tile_strides,
    utils,
    wide,
)
from jaxattn.pallas.smem import swizzled


def copy_rows(source, target, row, head, *, heads: int = 1, warpgroups: int = 1) -> None:
    """Start the copy of a tile to shared memory.

    Rows beyond the end of the source become copies of its last row: masked, but finite.

    Args:
      source: [R, N, H] in global memory.
      target: [heads * rows, H] in shared memory in the layout `swizzled`: the rows of the first
        head, then the rows of the next.
      row: first row to copy, int32.
      head: first head to copy, int32.
      heads: number of heads, each with a multiple of the 1024 / H rows that a warpgroup moves at a
        time.
      warpgroups: warpgroups of the program; all of them call this function.
    """
    dtype = source.dtype

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(swizzled(dtype)), SCALAR, SCALAR))
    def copy(_, source: Any, target: Any, row: Any, head: Any) -> None:
        _for_each_piece(source, target, row, head, heads, warpgroups, _copy_piece, clamp=True)

    copy(source, target, int32(row), int32(head))  # pyright: ignore[reportCallIssue]


def store_rows(source, target, row, head, *, heads: int = 1, warpgroups: int = 1) -> None:
    """Store a tile of shared memory in global memory; rows beyond its end are dropped.

    Arguments as for `copy_rows`, with source and target exchanged.
    """
    dtype = source.dtype

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(dtype)), plgpu.RefType(), SCALAR, SCALAR))
    def store(_, source: Any, target: Any, row: Any, head: Any) -> None:
        _for_each_piece(target, source, row, head, heads, warpgroups, _store_piece, clamp=False)

    store(source, target, int32(row), int32(head))  # pyright: ignore[reportCallIssue]


def copy_numbers(source, target, start) -> None:
    """Start the copy of consecutive 32-bit numbers to shared memory.

    Args:
      source: [numbers] in global memory; the copied numbers are inside it.
      target: [at most 512] in shared memory.
      start: index of the first number, a multiple of 4, int32.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
    def copy(_, source: Any, target: Any, start: Any) -> None:
        thread = utils.thread_idx()
        pieces = constant(shape(target)[0] // 4)
        with utils.when(arith.cmpi(arith.CmpIPredicate.slt, thread, pieces)):
            first = arith.muli(wide(start.registers.item()), constant(4, 64))
            offset = scaled(thread, 16)
            memory = shifted(shifted(global_pointer(source), first), offset)
            _copy_piece(memory, shifted(shared_pointer(target), offset))

    copy(source, target, int32(start))  # pyright: ignore[reportCallIssue]


def commit() -> None:
    """End a group of copies; the group may be empty."""

    @plgpu.inline_mgpu()
    def end_group(_) -> None:
        nvvm.cp_async_commit_group()

    end_group()  # pyright: ignore[reportCallIssue]


def wait(groups: int) -> None:
    """Wait until at most this many groups of the thread's copies are in flight."""

    @plgpu.inline_mgpu()
    def wait_for(_) -> None:
        nvvm.cp_async_wait_group(groups)

    wait_for()  # pyright: ignore[reportCallIssue]


def barrier(warpgroups: int = 1) -> None:
    """Wait for all threads of the program; orders their accesses to shared memory."""

    @plgpu.inline_mgpu()
    def synchronize(_) -> None:
        utils.inline_ptx(f"bar.sync 0, {warpgroups * THREADS};", has_side_effects=True)

    synchronize()  # pyright: ignore[reportCallIssue]


def pair_barrier() -> None:
    """Wait for both warps of a pair, warps 2 * i and 2 * i + 1 of the program."""

    @plgpu.inline_mgpu()
    def synchronize(_) -> None:
        # Barrier 0 is that of all threads.
        pair = arith.addi(arith.shrui(utils.thread_idx(), constant(6)), constant(1))
        utils.inline_ptx("bar.sync $0, 64;", pair, has_side_effects=True)

    synchronize()  # pyright: ignore[reportCallIssue]


def _copy_piece(memory, shared) -> None:
    nvvm.cp_async_shared_global(shared, memory, 16, nvvm.LoadCacheModifierKind.CG)


def _store_piece(memory, shared) -> None:
    piece = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
    llvm.store(llvm.load(piece, shared), memory)


def _for_each_piece(memory, shared, row, head, heads, warpgroups, move, *, clamp: bool) -> None:
    """Call move(pointer to global, to shared memory) for the 16-byte pieces of a thread."""
    row, head = row.registers.item(), head.registers.item()
    length, num_heads, head_dim = shape(memory)
    row_stride, column_stride = tile_strides(shared)
    rows = shape(shared)[0] * 8
    of_head = rows // heads
    row_bytes = 2 * num_heads * head_dim
    pieces = 2 * head_dim // 16  # of a row
    at_once = warpgroups * THREADS // pieces  # rows
    assert of_head % at_once == 0, (of_head, at_once)  # of one head
    thread = utils.thread_idx()
    piece, own = arith.remui(thread, constant(pieces)), arith.divui(thread, constant(pieces))
    # 128 bytes a row, its pieces permuted by the row's number (the swizzle).
    within = arith.andi(own, constant(7))
    swizzled_piece = arith.xori(arith.andi(piece, constant(7)), within)
    offset = arith.addi(
        arith.addi(
            scaled(arith.shrui(own, constant(3)), row_stride),
            scaled(arith.shrui(piece, constant(3)), column_stride),
        ),
        arith.addi(scaled(within, 128), scaled(swizzled_piece, 16)),
    )
    to_shared = shifted(shared_pointer(shared), offset)
    column = arith.addi(
        arith.muli(wide(head), constant(2 * head_dim, 64)),
        arith.muli(wide(piece), constant(16, 64)),
    )
    base = shifted(global_pointer(memory), column)
    first = arith.addi(row, own)

    def turns():
        """Yield of each turn: rows after the first, head, and offset in shared memory."""
        for start in range(0, rows, at_once):
            yield start % of_head, start // of_head, start // 8 * row_stride

    end = arith.addi(row, constant(of_head))
    inside = arith.cmpi(arith.CmpIPredicate.sle, end, constant(length))
    branch: Any = scf.IfOp(inside, [], has_else=True)
    with ir.InsertionPoint(branch.then_block):  # constant distances: one address for all pieces
        start = shifted(base, arith.muli(wide(first), constant(row_bytes, 64)))
        for behind, head_of_tile, in_shared in turns():
            n = behind * row_bytes + head_of_tile * 2 * head_dim
            move(shifted(start, n), shifted(to_shared, in_shared))
        scf.yield_([])
    with ir.InsertionPoint(branch.else_block):
        for behind, head_of_tile, in_shared in turns():
            at = arith.addi(first, constant(behind))
            exists = arith.cmpi(arith.CmpIPredicate.slt, at, constant(length))
            at = arith.minsi(at, constant(length - 1))
            start = shifted(base, arith.muli(wide(at), constant(row_bytes, 64)))
            pointers = shifted(start, head_of_tile * 2 * head_dim), shifted(to_shared, in_shared)
            if clamp:
                move(*pointers)
                continue
            with utils.when(exists):
                move(*pointers)
        scf.yield_([])
