"""Tile sizes of the kernels: the limits of the chips, and the choice by measured table or rule.

The sizes of a family's kernels, and its rule, are in `wgmma/tiles.py` and `mma/tiles.py`.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

# Rows of a score tile per warpgroup: the rows of one wgmma, or 16 rows of mma.sync for each warp.
WARPGROUP_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Shared memory of a compute capability, in bytes.

    Attributes:
      smem: largest of one program.
      smem_total: of a multiprocessor.
      name: architecture, for log lines.
    """

    smem: int
    smem_total: int
    name: str


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
CHIPS = {
    "8.0": Chip(smem=166_912, smem_total=167_936, name="an Ampere GPU"),
    "8.6": Chip(smem=101_376, smem_total=102_400, name="an Ampere GPU"),
    "8.9": Chip(smem=101_376, smem_total=102_400, name="an Ada GPU"),
    "9.0": Chip(smem=232_448, smem_total=233_472, name="a Hopper GPU"),
    "12.0": Chip(smem=101_376, smem_total=102_400, name="a Blackwell workstation GPU"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes of all kernels of a family.

    Attributes:
      family: "wgmma" or "mma".
      forward: `ForwardTiles` of the family.
      backward: `BackwardTiles` of the family.
      dq: `ForwardTiles` for the dq kernel of the deterministic backward, whose programs own queries
        as those of the forward kernel do. If both have the same block map, they share it.
    """

    family: str
    forward: Any
    backward: Any
    dq: Any

    def __str__(self) -> str:
        """Return queries x keys of a program's tile and its query heads, for log lines."""
        fwd, bwd = self.forward, self.backward
        return (
            f"forward {fwd.queries}x{fwd.block_kv} x {fwd.qheads_per_tile} heads, "
            f"backward {bwd.block_q}x{bwd.block_kv}"
        )


def tuned_or(rule: Tiles, table: pathlib.Path, **layout: Any) -> Tiles:
    """Return the tiles that `jaxattn.tune` measured, or those of the rule.

    Tiles change speed; results differ by rounding only. The dq kernel is not tuned.

    Args:
      rule: tiles by rule.
      table: file of `jaxattn.tune`; may be missing.
      layout: fields of the row to take: numbers of heads, head dim, and capability if rows have it.
    """
    for row in _rows(table):
        if all(row[name] == value for name, value in layout.items()):
            forward, backward = type(rule.forward), type(rule.backward)
            return dataclasses.replace(
                rule, forward=forward(**row["forward"]), backward=backward(**row["backward"])
            )
    return rule


@functools.cache
def _rows(table: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads(table.read_text()) if table.exists() else []


def scratch_bytes(scratch: Mapping[str, Any]) -> int:
    """Return the bytes of shared memory of a kernel's `scratch`, with barriers."""
    total = 0
    for ref in scratch.values():
        if isinstance(ref, plgpu.Barrier):
            total += 8 * int(np.prod(ref.num_barriers))  # of one or several axes
        else:
            total += math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
    return total
