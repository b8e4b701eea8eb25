"""Candidate tile sizes of a kernel family on a chip, and the reasons why others cannot run."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp

from jaxattn.pallas.mma import backward as mma_backward
from jaxattn.pallas.mma import forward as mma_forward
from jaxattn.pallas.mma import tiles as mma
from jaxattn.pallas.tiles import CHIPS, WARPGROUP_ROWS, Tiles, scratch_bytes
from jaxattn.pallas.wgmma import tiles as wgmma
from jaxattn.pallas.wgmma.backward import kernel as wgmma_backward
from jaxattn.pallas.wgmma.forward import kernel as wgmma_forward

Part = wgmma.ForwardTiles | wgmma.BackwardTiles | mma.ForwardTiles | mma.BackwardTiles
Layout = tuple[int, int, int]  # query heads, kv heads, head dim

_SCRATCH: dict[type, Any] = {
    wgmma.ForwardTiles: wgmma_forward.scratch,
    wgmma.BackwardTiles: wgmma_backward.scratch,
    mma.ForwardTiles: mma_forward.scratch,
    mma.BackwardTiles: mma_backward.scratch,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Candidates of one kernel family on one chip.

    Attributes:
      family: key of `jaxattn.pallas.op.FAMILIES`.
      capability: compute capability of the chip, a key of `CHIPS`.
    """

    family: str
    capability: str

    @property
    def table(self) -> pathlib.Path:
        """Default path of the table."""
        return wgmma.TABLE if self.family == "wgmma" else mma.TABLE

    @property
    def fields(self) -> dict[str, str]:
        """Fields of a row that name the chip."""
        return {} if self.family == "wgmma" else {"capability": self.capability}

    def rule(self, layout: Layout) -> Tiles:
        """Return the tiles that the search starts from."""
        rule = wgmma.rule_tiles if self.family == "wgmma" else mma.rule_tiles
        return rule(*layout, **self.fields)

    def forward(self, layout: Layout) -> list[Part]:
        """List the candidates of the forward kernel: 1 to 8 heads that divide the group.

        wgmma: 64 to 192 keys, of which block patterns cannot use 192; two to four stages. mma: 64
        or 128 rows, 32 to 128 keys, one or two stages; tiles whose sums need more registers than a
        thread has are left out.
        """
        num_heads, num_kv_heads, head_dim = layout
        packed = [heads for heads in (1, 2, 4, 8) if num_heads // num_kv_heads % heads == 0]
        if self.family == "wgmma":
            return [
                wgmma.ForwardTiles(qheads_per_tile=heads, block_kv=block_kv, stages=stages)
                for heads in packed
                for block_kv in (64, 128, 192)
                for stages in (2, 3, 4)
            ]
        return [
            mma.ForwardTiles(rows=rows, qheads_per_tile=heads, block_kv=block_kv, stages=stages)
            for rows in (64, 128)
            for heads in packed
            if rows // heads >= 1024 // head_dim
            for block_kv in (32, 64, 128)
            if rows * (block_kv + head_dim) <= 128 * 192
            for stages in (1, 2)
        ]

    def backward(self, layout: Layout) -> list[Part]:
        """List the candidates of the backward kernel.

        wgmma: 64 or 128 queries, two or three stages; the keys are 64 per consumer warpgroup. mma:
        one or two warpgroups with 64 keys each, one or two stages.
        """
        if self.family == "wgmma":
            block_kv = WARPGROUP_ROWS * wgmma.CONSUMERS
            return [
                wgmma.BackwardTiles(block_q=block_q, block_kv=block_kv, stages=stages)
                for block_q in (64, 128)
                for stages in (2, 3)
            ]
        rule = self.rule(layout).backward
        return [
            dataclasses.replace(rule, block_kv=block_kv, stages=stages)
            for block_kv in (64, 128)
            for stages in (1, 2)
        ]

    def why_not(self, part: Part, layout: Layout) -> str | None:
        """Return the reason why these tiles cannot run, or None."""
        need, most = smem_bytes(part, layout), CHIPS[self.capability].smem
        if need > most:
            return f"needs {need:,} bytes of shared memory, has {most:,}"
        if isinstance(part, wgmma.BackwardTiles):
            rows, _ = wgmma_backward.dq_part(layout[2], part)
            if rows % WARPGROUP_ROWS:
                return f"a warpgroup's part of dQ has {rows} rows, wgmma needs {WARPGROUP_ROWS}"
        return None


def smem_bytes(part: Part, layout: Layout) -> int:
    """Return the shared memory of one program in bytes."""
    return scratch_bytes(_SCRATCH[type(part)](layout[2], jnp.dtype(jnp.bfloat16), part))
