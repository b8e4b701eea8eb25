"""Tile sizes of the mma.sync kernels for each chip, by measured table or rule."""

import dataclasses
import math
import pathlib

from jaxattn.block_map import Tiling
from jaxattn.pallas.tiles import CHIPS, WARPGROUP_ROWS, Tiles, tuned_or

# Bytes of shared memory that the driver takes from each program.
RESERVED_SMEM = 1024
# Tile sizes that `python -m jaxattn.tune` measured.
TABLE = pathlib.Path(__file__).parents[2] / "tuned_mma.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardTiles:
    """Tile sizes of the forward kernel and the dq kernel.

    Attributes:
      rows: rows of a program, queries times heads: 64, or in the forward kernel 128.
      qheads_per_tile: query heads of one kv head that share a tile (FlashAttention's pack_gqa): 1,
        2, 4 or 8.
      block_kv: keys in a tile, a multiple of 32.
      stages: K tiles (and V tiles) in shared memory.
    """

    rows: int
    qheads_per_tile: int
    block_kv: int
    stages: int

    def __str__(self) -> str:
        """Return the sizes in words."""
        heads = f"{self.qheads_per_tile} heads"
        return f"{self.rows} rows, {heads}, {self.block_kv} keys, {_stages(self.stages)}"

    @property
    def queries(self) -> int:
        """Queries of a program, each with `qheads_per_tile` heads."""
        return self.rows // self.qheads_per_tile

    @property
    def tiling(self) -> Tiling:
        """Tile sizes of the block map."""
        repeat = self.qheads_per_tile
        return Tiling(group_rows=self.queries, groups=1, block_cols=self.block_kv, repeat=repeat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTiles:
    """Tile sizes of the backward kernel.

    Attributes:
      block_q: queries in a tile, a multiple of 64.
      block_kv: keys of a program: 64 for each warpgroup, of which there are 1 or 2.
      stages: Q tiles (and dO tiles) in shared memory, 1 or 2.
      vector: dQ is added four numbers per instruction (sm_90 and later).
      entry_in_smem: the entry of the work list is read from shared memory at each use, because no
        registers are left to keep it (before sm_90).
    """

    block_q: int
    block_kv: int
    stages: int
    vector: bool
    entry_in_smem: bool

    def __str__(self) -> str:
        """Return the sizes in words."""
        return f"{self.block_q} queries, {self.block_kv} keys, {_stages(self.stages)}"

    @property
    def warpgroups(self) -> int:
        """Warpgroups of a program."""
        return self.block_kv // WARPGROUP_ROWS

    @property
    def tiling(self) -> Tiling:
        """Tile sizes of the block map, whose rows are keys."""
        groups = self.warpgroups
        return Tiling(group_rows=WARPGROUP_ROWS, groups=groups, block_cols=self.block_q)


def _stages(count: int) -> str:
    return f"{count} stage{'s' if count > 1 else ''}"


def choose_tiles(num_heads: int, num_kv_heads: int, head_dim: int, capability: str) -> Tiles:
    """Return the tile sizes for these heads on a chip: measured by `jaxattn.tune`, else by rule."""
    layout = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    rule = rule_tiles(**layout, capability=capability)
    return tuned_or(rule, TABLE, **layout, capability=capability)


def rule_tiles(num_heads: int, num_kv_heads: int, head_dim: int, capability: str) -> Tiles:
    """Return tile sizes within the chip's shared memory, for any heads.

    The forward kernel takes 128 rows, 32 per warp, so that a fragment of K or V serves two
    products: its loads from shared memory are the limit on sm_80 and sm_90. The chips with 99 KiB
    have a half or a quarter of their products per cycle, and 64 rows leave room for a second
    program on the multiprocessor, whose products run during the softmax of the first. Two
    warpgroups share K and V in the backward kernel if they fit. Two stages, if they do not cost the
    second program.
    """
    chip, before_hopper = CHIPS[capability], capability in ("8.0", "8.6", "8.9")
    qheads = math.gcd(num_heads // num_kv_heads, 8)
    large = head_dim == 64 or chip.smem > 128 * 1024
    tile = 2 * head_dim * 64  # bytes of 64 rows
    rows = 128 if large else 64

    def stages(own: int, of_stage: int) -> int:
        """Return 2 if as many programs fit as with 1."""

        def programs(stages: int) -> int:
            need = own + stages * of_stage + 2 * 4 * 128 + RESERVED_SMEM
            return min(2, chip.smem_total // need)

        return 2 if programs(2) == programs(1) else 1

    return Tiles(
        family="mma",
        forward=ForwardTiles(
            rows=rows,
            qheads_per_tile=qheads,
            block_kv=64,
            stages=stages(rows // 64 * tile, 2 * tile),
        ),
        dq=ForwardTiles(
            rows=64,
            # The rows that are copied at a time belong to one head.
            qheads_per_tile=min(qheads, head_dim // 16),
            block_kv=64,
            stages=stages(2 * tile, 2 * tile),
        ),
        backward=BackwardTiles(
            block_q=64,
            block_kv=128 if large else 64,
            stages=2 if large else 1,
            vector=not before_hopper,
            entry_in_smem=before_hopper,
        ),
    )
