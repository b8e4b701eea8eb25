"""Fragments of the factors of mma.sync: loads from shared memory by ldmatrix, and stores.

A warpgroup's product of [m, k] and [k, n] runs as mma.sync.m16n8k16. `plgpu.mma` takes both
factors from registers; all of a K tile as a factor would take 128 of them, so these functions load
16 of the contraction at a time. Of the 4 warps of a warpgroup, `m_warps` divide the rows of the
product, 16 rows each, and the others its columns, 8 each. With 4 `m_warps` the accumulator has the
layout of wgmma (`softmax.TILE`), so both kernel families share `softmax`.
"""

import functools
from typing import Any, Literal

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jaxlib.mlir.dialects import llvm, nvvm

from jaxattn.pallas.mma.lanes import (
    constant,
    lane,
    scaled,
    shared_pointer,
    shifted,
    tile_strides,
    utils,
    warp_coordinates,
    warpgroup,
)
from jaxattn.pallas.smem import swizzled
from jaxattn.pallas.softmax import TILE

# Contraction of one mma.sync, in 16-bit numbers.
MMA_K = 16
# `m_warps` with which pairs of warps share the rows of a product, each with half of its columns.
OF_PAIRS = 2


def acc_layout(dtype, m_warps: int):
    """Return the layout of the accumulator."""
    return plgpu.Layout.MMA_ACC(jnp.dtype(dtype), m_warps=m_warps)


def load_factor(
    ref,
    k: int,
    *,
    side: Literal["left", "right"],
    along: Literal["rows", "columns"],
    warpgroups: int = 1,
    m_warps: int = 4,
    of_warp: Literal["this", "other"] | None = None,
):
    """Load 16 of the contraction of a tile in shared memory as a factor of `plgpu.mma`.

    By ldmatrix, four 8 x 8 matrices at a time.

    Args:
      ref: [rows, columns] in shared memory in the layout `swizzled`.
      k: the rows or columns 16 * k to 16 * k + 15 are loaded; 16 of 32 * k to 32 * k + 31 with
        `of_warp`.
      side: the left factor, [m, 16], or the right one, [16, n].
      along: the axis of `ref` that is summed over. For rows, ldmatrix transposes.
      warpgroups: warpgroups that divide the columns of a right factor along rows evenly.
      m_warps: warps along the rows of the product.
      of_warp: with two warps along the columns of a product, it divides its columns among them by
        eights. This: of 32 of the contraction, the 16 that the warp has; other: those of the other
        warp along the columns. None: 16 neighbors.

    References:
      PTX ISA, ldmatrix and the fragments of mma.m16n8k16.
    """
    dtype, n_warps, is_left = jnp.dtype(ref.dtype), 4 // m_warps, side == "left"
    make_layout = plgpu.Layout.MMA_LHS if is_left else plgpu.Layout.MMA_RHS
    layout = make_layout(dtype, m_warps=m_warps)
    # The other axis, which is not summed over: its length, and the part that one load has.
    length = ref.shape[0 if along == "columns" else 1] // warpgroups
    step = 16 * m_warps if is_left else 64 // m_warps
    k_step = MMA_K if of_warp is None else n_warps * MMA_K
    size = (length, MMA_K) if is_left else (MMA_K, length)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzled(dtype)),),
        return_type=plgpu.ShapeDtypeStruct(size, dtype, layout=layout),
    )
    def load(_, ref: Any) -> Any:
        row_stride, column_stride = tile_strides(ref)
        m_warp, n_warp = warp_coordinates(m_warps)
        # A lane's address is that of a row of one of the matrices. Neighboring registers hold
        # both halves of the contraction (right) or of 16 rows (left), as mma.sync takes them.
        row = arith.andi(lane(), constant(7))
        first = arith.andi(arith.shrui(lane(), constant(3)), constant(1))
        second = arith.shrui(lane(), constant(4))

        def eight(half):
            """Return which eight of the contraction holds a half of the 16."""
            if of_warp is None:
                return half
            warp = n_warp if of_warp == "this" else arith.xori(n_warp, constant(1))
            return arith.addi(scaled(half, n_warps), warp)

        if is_left:
            other, summed = arith.addi(first, scaled(m_warp, 2)), eight(second)
        else:
            other, summed = arith.addi(scaled(second, n_warps), n_warp), eight(first)
        below, right = (other, summed) if along == "columns" else (summed, other)
        i32 = ir.IntegerType.get_signless(32)
        # Opaque to the compiler, which else keeps the offset of every piece in its own register.
        of_lane = utils.inline_ptx(
            "mov.b32 $0, $1;",
            _swizzled_offset(below, right, row, row_stride),
            result_types=i32,
            has_side_effects=True,
        )
        registers = []
        for start in range(0, length, step):
            at_row, at_column = (start, k_step * k) if along == "columns" else (k_step * k, start)
            offset = arith.xori(of_lane, constant(at_column % 64 // 8 * 16))
            if warpgroups > 1 and length % 64:  # a part of 64 columns
                offset = arith.xori(offset, scaled(warpgroup(), 2 * length))
            elif warpgroups > 1:
                offset = arith.addi(offset, scaled(warpgroup(), length // 64 * column_stride))
            address = shifted(shared_pointer(ref), offset)
            loaded = nvvm.ldmatrix(
                shifted(address, at_row // 8 * row_stride + at_column // 64 * column_stride),
                layout=nvvm.MMALayout.row if along == "columns" else nvvm.MMALayout.col,
                num=4,
                shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
                elt_type=nvvm.LdStMatrixEltType.B16,
            )
            registers += [llvm.extractvalue(i32, loaded, [j]) for j in range(4)]
        pair = ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
        target = layout.to_mgpu()
        found = np.empty(target.registers_shape(size), dtype=object)
        found.flat[:] = [utils.bitcast(r, pair) for r in registers]
        return mgpu.FragmentedArray(_registers=found, _layout=target, _is_signed=None)

    return load(ref)  # pyright: ignore[reportCallIssue]


def add_product(sums, left, right, *, along: Literal["rows", "columns"], m_warps: int):
    """Add left @ right; both factors are in shared memory.

    Args:
      sums: fp32 [m, n] in the layout `acc_layout`.
      left: ref [m, contraction].
      right: ref [contraction, n], summed along rows, or [n, contraction], summed along columns.
      along: the axis of `right` that is summed over.
      m_warps: warps along the rows of the product.
    """
    for c in range(left.shape[1] // MMA_K):
        factor = load_factor(right, c, side="right", along=along, m_warps=m_warps)
        sums = plgpu.mma(
            sums, load_factor(left, c, side="left", along="columns", m_warps=m_warps), factor
        )
    return sums


def add_product_of_pair(sums, value, left, right):
    """Add value @ right, of which each of two warps along the columns has half in registers.

    A warp takes its own columns of the value from registers, and the others from shared memory,
    where the other warp stored them: half the loads of the left factor of `add_product`.

    Args:
      sums: fp32 [m, n] in the layout `acc_layout` with `OF_PAIRS`.
      value: [m, contraction] of 16-bit numbers in this layout.
      left: ref [m, contraction] that holds the value.
      right: ref [contraction, n].
    """
    load = functools.partial(load_factor, m_warps=OF_PAIRS)
    for of_warp in ("this", "other"):
        for c in range(value.shape[1] // (2 * MMA_K)):
            factor = load(right, c, side="right", along="rows", of_warp=of_warp)
            if of_warp == "this":
                mine = own_left_factor(value, c)
            else:
                mine = load(left, c, side="left", along="columns", of_warp=of_warp)
            sums = plgpu.mma(sums, mine, factor)
    return sums


def own_left_factor(value, k: int):
    """Return, of 32 columns of a product, the 16 that a warp of a pair has as a left factor.

    Args:
      value: [m, columns] of 16-bit numbers in the layout `acc_layout` with `OF_PAIRS`.
      k: the columns are 32 * k to 32 * k + 31.
    """
    dtype = jnp.dtype(value.dtype)
    layout, size = plgpu.Layout.MMA_LHS(dtype, m_warps=OF_PAIRS), (value.shape[0], MMA_K)

    @plgpu.inline_mgpu(
        arg_types=(acc_layout(dtype, OF_PAIRS),),
        return_type=plgpu.ShapeDtypeStruct(size, dtype, layout=layout),
    )
    def relabel(_, value: Any) -> Any:
        target = layout.to_mgpu()
        # [16 rows of the warp, 8 columns of the warp, half of the rows]
        eights = value.registers.reshape(value.shape[0] // (16 * OF_PAIRS), -1, 2)
        registers = eights[:, 2 * k : 2 * k + 2].reshape(target.registers_shape(size))
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=None)

    return relabel(value)  # pyright: ignore[reportCallIssue]


def as_left_factor(x):
    """Return a product in the inputs' dtype as the left factor of the next: the same registers.

    Args:
      x: [rows, columns] of 16-bit numbers in the layout `TILE`.
    """
    layout = plgpu.Layout.MMA_LHS(jnp.dtype(x.dtype), m_warps=4)

    @plgpu.inline_mgpu(
        arg_types=(TILE,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout),
    )
    def relabel(_, x: Any) -> Any:
        target = layout.to_mgpu()
        registers = x.registers.reshape(target.registers_shape(x.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=None)

    return relabel(x)  # pyright: ignore[reportCallIssue]


def store_product(ref, value, m_warps: int) -> None:
    """Store a product in shared memory: by stmatrix (sm_90 and later), else 4 bytes a thread.

    Args:
      ref: [rows, columns] in shared memory in the layout `swizzled`.
      value: of this shape and dtype, in the layout `acc_layout`.
      m_warps: warps along the rows of the product.

    References:
      PTX ISA, stmatrix.
    """
    dtype, n_warps = value.dtype, 4 // m_warps

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(swizzled(dtype)), acc_layout(dtype, m_warps)))
    def store(_, ref: Any, value: Any) -> None:
        row_stride, column_stride = tile_strides(ref)
        m_warp, n_warp = warp_coordinates(m_warps)
        by_matrix = utils.get_arch().major >= 9
        if by_matrix:  # a lane's address is that of a row of one of four 8 x 8 matrices
            row = arith.andi(lane(), constant(7))
            below = arith.andi(arith.shrui(lane(), constant(3)), constant(1))
            right = scaled(arith.shrui(lane(), constant(4)), n_warps)
            within = constant(0)
        else:  # a lane stores its own two numbers of each matrix
            row = arith.shrui(lane(), constant(2))
            below = right = constant(0)
            within = scaled(arith.andi(lane(), constant(3)), 4)
        offset = _swizzled_offset(
            arith.addi(below, scaled(m_warp, 2)), arith.addi(right, n_warp), row, row_stride
        )
        offset = arith.addi(offset, within)

        def address(eight: int, piece: int):
            """Return the address `eight` * 8 rows below and `piece` * 8 columns to the right."""
            at = shifted(shared_pointer(ref), arith.xori(offset, constant(piece % 8 * 16)))
            return shifted(at, piece // 8 * column_stride + eight * row_stride)

        i32 = ir.IntegerType.get_signless(32)
        registers = value.registers.reshape(value.shape[0] // (16 * m_warps), -1, 2)
        for i, j in np.ndindex(registers.shape[0], registers.shape[1] // 2):
            four = [utils.bitcast(x, i32) for x in registers[i, 2 * j : 2 * j + 2].flat]
            eight, piece = 2 * m_warps * i, 2 * n_warps * j
            if by_matrix:
                ptx = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};"
                utils.inline_ptx(ptx, address(eight, piece), *four, has_side_effects=True)
                continue
            for n, register in enumerate(four):
                llvm.store(register, address(eight + n % 2, piece + n // 2 * n_warps))

    store(ref, value)  # pyright: ignore[reportCallIssue]


def _swizzled_offset(below, right, row, row_stride: int):
    """Return the offset of a row of an 8 x 8 matrix in a tile in the layout `swizzled`.

    Args:
      below: matrices above it.
      right: matrices left of it, below 8.
      row: row in the matrix. 128 bytes a row, its 16-byte pieces permuted by the row's number.
      row_stride: bytes from 8 rows to the next 8.
    """
    return arith.addi(
        arith.addi(scaled(below, row_stride), scaled(row, 128)),
        scaled(arith.xori(right, row), 16),
    )
