"""Candidate tile sizes of the mma.sync kernels, and the reasons why others cannot run."""

import jax.numpy as jnp

from jaxattn.pallas.mma import backward, forward
from jaxattn.pallas.mma.tiles import CHIPS, BackwardTiles, ForwardTiles, rule_tiles
from jaxattn.pallas.tiles import scratch_bytes

Part = ForwardTiles | BackwardTiles
Layout = tuple[int, int, int]  # query heads, kv heads, head dim


def forward_candidates(layout: Layout) -> list[ForwardTiles]:
    """List 64 or 128 rows, 1 to 8 heads that divide the group, 32 to 128 keys, one or two stages.

    Tiles whose sums need more registers than a thread has are left out.
    """
    num_heads, num_kv_heads, head_dim = layout
    return [
        ForwardTiles(rows=rows, qheads_per_tile=heads, block_kv=block_kv, stages=stages)
        for rows in (64, 128)
        for heads in (1, 2, 4, 8)
        if num_heads // num_kv_heads % heads == 0 and rows // heads >= 1024 // head_dim
        for block_kv in (32, 64, 128)
        if rows * (block_kv + head_dim) <= 128 * 192
        for stages in (1, 2)
    ]


def backward_candidates(layout: Layout, capability: str) -> list[BackwardTiles]:
    """List one or two warpgroups with 64 keys each, one or two stages."""
    vector = rule_tiles(*layout, capability).backward.vector
    return [
        BackwardTiles(block_q=64, block_kv=block_kv, stages=stages, vector=vector)
        for block_kv in (64, 128)
        for stages in (1, 2)
    ]


def why_not(part: Part, layout: Layout, capability: str) -> str | None:
    """Return the reason why these tiles cannot run, or None."""
    need, most = smem_bytes(part, layout), CHIPS[capability].smem
    return f"needs {need:,} bytes of shared memory, has {most:,}" if need > most else None


def smem_bytes(part: Part, layout: Layout) -> int:
    """Return the shared memory of one program in bytes."""
    bf16 = jnp.dtype(jnp.bfloat16)
    if isinstance(part, ForwardTiles):
        return scratch_bytes(forward.scratch(layout[2], bf16, part))
    return scratch_bytes(backward.scratch(layout[2], bf16, part))


def text(part: Part) -> str:
    """Describe a candidate in words."""
    stages = f"{part.stages} stage{'s' if part.stages > 1 else ''}"
    if isinstance(part, ForwardTiles):
        heads = f"{part.qheads_per_tile} heads"
        return f"forward {part.rows} rows, {heads}, {part.block_kv} keys, {stages}"
    return f"backward {part.block_q} queries, {part.block_kv} keys, {stages}"
