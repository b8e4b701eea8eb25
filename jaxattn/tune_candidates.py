"""Candidate tile sizes for a layout of heads, and the reasons why others cannot run."""

import jax.numpy as jnp

from jaxattn.pallas.tiles import (
    CONSUMERS,
    SMEM_BYTES,
    WARPGROUP_ROWS,
    BackwardTiles,
    ForwardTiles,
    scratch_bytes,
)
from jaxattn.pallas.wgmma.backward import kernel as backward
from jaxattn.pallas.wgmma.forward import kernel as forward

Part = ForwardTiles | BackwardTiles
Layout = tuple[int, int, int]  # query heads, kv heads, head dim


def forward_candidates(layout: Layout) -> list[ForwardTiles]:
    """List 1 to 8 heads that divide the group, 64 to 192 keys, two to four stages.

    Block patterns cannot use 192 keys.
    """
    group = layout[0] // layout[1]
    return [
        ForwardTiles(qheads_per_tile=heads, block_kv=block_kv, stages=stages)
        for heads in (1, 2, 4, 8)
        if group % heads == 0
        for block_kv in (64, 128, 192)
        for stages in (2, 3, 4)
    ]


def backward_candidates() -> list[BackwardTiles]:
    """List 64 or 128 queries, two or three stages; the keys are 64 per consumer warpgroup."""
    return [
        BackwardTiles(block_q=block_q, block_kv=WARPGROUP_ROWS * CONSUMERS, stages=stages)
        for block_q in (64, 128)
        for stages in (2, 3)
    ]


def why_not(part: Part, layout: Layout) -> str | None:
    """Return the reason why these tiles cannot run, or None."""
    need = smem_bytes(part, layout)
    if need > SMEM_BYTES:
        return f"needs {need:,} bytes of shared memory, has {SMEM_BYTES:,}"
    if isinstance(part, BackwardTiles):
        rows, _ = backward.dq_part(layout[2], part)
        if rows % WARPGROUP_ROWS:
            return f"a warpgroup's part of dQ has {rows} rows, wgmma needs {WARPGROUP_ROWS}"
    return None


def smem_bytes(part: Part, layout: Layout) -> int:
    """Return the shared memory of one program in bytes."""
    bf16 = jnp.dtype(jnp.bfloat16)
    if isinstance(part, ForwardTiles):
        return scratch_bytes(forward.scratch(layout[2], bf16, part))
    return scratch_bytes(backward.scratch(layout[2], bf16, part))


def text(part: Part) -> str:
    """Describe a candidate in words."""
    if isinstance(part, ForwardTiles):
        return f"forward {part.qheads_per_tile} heads, {part.block_kv} keys, {part.stages} stages"
    return f"backward {part.block_q} queries, {part.block_kv} keys, {part.stages} stages"
