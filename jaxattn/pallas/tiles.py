"""Tile sizes of the kernels: their bounds, and the choice by measured table or rule."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from jaxattn.block_map import Tiling

# Rows of a score tile per warpgroup: the rows of one wgmma instruction.
WARPGROUP_ROWS = 64
# Consumer warpgroups; one more warpgroup is the producer.
CONSUMERS = 2
# Largest shared memory of one program on sm_90 (compute capability 9.0), in bytes.
SMEM_BYTES = 232_448
# Tile sizes that `python -m jaxattn.tune` measured.
TABLE = pathlib.Path(__file__).parents[1] / "tuned.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardTiles:
    """Tile sizes of the forward kernel.

    Attributes:
      qheads_per_tile: query heads of one kv head that share a tile (FlashAttention's pack_gqa), so
        that K and V are read once for all of them and a short document fills more of the tile: 1,
        2, 4 or 8.
      block_kv: keys in a tile, a multiple of 64.
      stages: K tiles (and V tiles) in shared memory.
    """

    qheads_per_tile: int
    block_kv: int
    stages: int

    @property
    def warpgroup_queries(self) -> int:
        """Queries of one warpgroup, whose 64 rows are `qheads_per_tile` heads of each query."""
        return WARPGROUP_ROWS // self.qheads_per_tile

    @property
    def tiling(self) -> Tiling:
        """Tile sizes of the block map."""
        return Tiling(
            group_rows=self.warpgroup_queries,
            groups=CONSUMERS,
            block_cols=self.block_kv,
            repeat=self.qheads_per_tile,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTiles:
    """Tile sizes of the backward kernel.

    Attributes:
      block_q: queries in a tile, a multiple of 64.
      block_kv: keys in a tile: 64 for each consumer warpgroup.
      stages: Q tiles (and dO tiles) in shared memory; also the slots of dS.
    """

    block_q: int
    block_kv: int
    stages: int

    @property
    def tiling(self) -> Tiling:
        """Tile sizes of the block map, whose rows are keys."""
        return Tiling(group_rows=self.block_kv, groups=1, block_cols=self.block_q)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DqTiles(ForwardTiles):
    """Tile sizes of the dq kernel of the deterministic backward: rows as in the forward kernel.

    If `qheads_per_tile` and `block_kv` equal those of the forward kernel, both kernels share one
    block map.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes of all kernels."""

    family: ClassVar[str] = "wgmma"
    forward: ForwardTiles
    backward: BackwardTiles
    dq: DqTiles

    def __str__(self) -> str:
        """Return queries x keys of a program's tile and its query heads, for log lines."""
        fwd, bwd = self.forward, self.backward
        return (
            f"forward {CONSUMERS * fwd.warpgroup_queries}x{fwd.block_kv} x "
            f"{fwd.qheads_per_tile} heads, "
            f"backward {bwd.block_q}x{bwd.block_kv}"
        )


def choose_tiles(num_heads: int, num_kv_heads: int, head_dim: int) -> Tiles:
    """Return the tile sizes for these heads: measured by `jaxattn.tune`, else by rule.

    They change speed; results differ by rounding only.
    """
    heads = num_heads, num_kv_heads, head_dim
    return tuned_tiles(TABLE).get(heads) or rule_tiles(*heads)


def rule_tiles(num_heads: int, num_kv_heads: int, head_dim: int) -> Tiles:
    """Return tile sizes within the shared-memory budget, for any heads.

    128 keys a tile is the most that two consumer warpgroups hold without register spills at
    head_dim 128; shared memory then allows two stages. At head_dim 64 the backward takes 128
    queries, because the consumers split dQ by rows and wgmma needs 64 rows.
    """
    small = head_dim == 64
    qheads, stages = math.gcd(num_heads // num_kv_heads, 8), 4 if small else 2
    return Tiles(
        forward=ForwardTiles(qheads_per_tile=qheads, block_kv=128, stages=stages),
        dq=DqTiles(qheads_per_tile=qheads, block_kv=128, stages=stages),
        backward=BackwardTiles(block_q=128 if small else 64, block_kv=128, stages=2),
    )


@functools.cache
def tuned_tiles(path: pathlib.Path) -> dict[tuple[int, int, int], Tiles]:
    """Read the tiles by (query heads, kv heads, head dim) from a table of `jaxattn.tune`.

    Empty if there is no such file. The dq kernel is not tuned: its tiles are those of
    `rule_tiles`.
    """
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())
    layouts = [(row["num_heads"], row["num_kv_heads"], row["head_dim"]) for row in rows]
    return {
        layout: dataclasses.replace(
            rule_tiles(*layout),
            forward=ForwardTiles(**row["forward"]),
            backward=BackwardTiles(**row["backward"]),
        )
        for layout, row in zip(layouts, rows, strict=True)
    }


def scratch_bytes(scratch: Mapping[str, Any]) -> int:
    """Return the bytes of shared memory of a kernel's `scratch`, with barriers."""
    total = 0
    for ref in scratch.values():
        if isinstance(ref, plgpu.Barrier):
            total += 8 * int(np.prod(ref.num_barriers))  # of one or several axes
        else:
            total += math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
    return total
