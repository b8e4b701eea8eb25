"""Tile sizes of the wgmma kernels, by measured table or rule, and their warpgroups."""

import dataclasses
import math
import pathlib

from jaxattn.block_map import Tiling
from jaxattn.pallas.tiles import WARPGROUP_ROWS, Tiles, tuned_or

# Consumer warpgroups; the last warpgroup is the producer, whose index this is.
CONSUMERS = PRODUCER = 2
# Registers per thread. The producer needs few: 24 + 2 * 240 = 3 * 168 is all that exist.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
# Tile sizes that `python -m jaxattn.tune` measured.
TABLE = pathlib.Path(__file__).parents[2] / "tuned.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardTiles:
    """Tile sizes of the forward kernel and the dq kernel.

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

    def __str__(self) -> str:
        """Return the sizes in words."""
        return f"{self.qheads_per_tile} heads, {self.block_kv} keys, {self.stages} stages"

    @property
    def warpgroup_queries(self) -> int:
        """Queries of one warpgroup, whose 64 rows are `qheads_per_tile` heads of each query."""
        return WARPGROUP_ROWS // self.qheads_per_tile

    @property
    def queries(self) -> int:
        """Queries of a row tile."""
        return CONSUMERS * self.warpgroup_queries

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

    def __str__(self) -> str:
        """Return the sizes in words."""
        return f"{self.block_q} queries, {self.block_kv} keys, {self.stages} stages"

    @property
    def tiling(self) -> Tiling:
        """Tile sizes of the block map, whose rows are keys."""
        return Tiling(group_rows=self.block_kv, groups=1, block_cols=self.block_q)


def choose_tiles(num_heads: int, num_kv_heads: int, head_dim: int) -> Tiles:
    """Return the tile sizes for these heads: measured by `jaxattn.tune`, else by rule."""
    layout = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return tuned_or(rule_tiles(**layout), TABLE, **layout)


def rule_tiles(num_heads: int, num_kv_heads: int, head_dim: int) -> Tiles:
    """Return tile sizes within the shared-memory budget, for any heads.

    128 keys a tile is the most that two consumer warpgroups hold without register spills at
    head_dim 128; shared memory then allows two stages. At head_dim 64 the backward takes 128
    queries, because the consumers split dQ by rows and wgmma needs 64 rows.
    """
    small = head_dim == 64
    qheads, stages = math.gcd(num_heads // num_kv_heads, 8), 4 if small else 2
    forward = ForwardTiles(qheads_per_tile=qheads, block_kv=128, stages=stages)
    backward = BackwardTiles(block_q=128 if small else 64, block_kv=128, stages=2)
    return Tiles(family="wgmma", forward=forward, backward=backward, dq=forward)
