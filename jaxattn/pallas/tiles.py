"""Tile sizes of the kernels: what they may be, and which are used."""

import dataclasses
import math

# A warpgroup's share of a score tile: the rows of one wgmma instruction.
WARPGROUP_ROWS = 64
# Warpgroups that compute; one more copies data in.
CONSUMERS = 2
# Shared memory that one program may have on sm_90 (compute capability 9.0), in bytes.
SMEM_BYTES = 232_448


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardTiles:
    """Tile sizes of the forward kernel.

    Attributes:
      heads: query heads of one kv head that share a tile, so that K and V are read once for all
        of them and a short document fills more of the tile: 1, 2, 4 or 8.
      block_kv: keys in a tile, a multiple of 64.
      stages: K tiles (and V tiles) in flight.
    """

    heads: int
    block_kv: int
    stages: int

    @property
    def group(self) -> int:
        """Queries of one warpgroup; its 64 rows are `heads` heads of each."""
        return WARPGROUP_ROWS // self.heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardTiles:
    """Tile sizes of the backward kernel.

    Attributes:
      block_q: queries in a tile, a multiple of 64.
      block_kv: keys in a tile: 64 for each computing warpgroup.
      stages: Q tiles (and dO tiles) in flight; also the slots of dS.
    """

    block_q: int
    block_kv: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DqTiles(ForwardTiles):
    """Tile sizes of the deterministic backward's dq kernel: rows as in the forward's.

    Where `heads` and `block_kv` are the forward's too, both kernels share one block map.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tile sizes of all kernels."""

    forward: ForwardTiles
    backward: BackwardTiles
    dq: DqTiles

    def __str__(self) -> str:
        """For log lines: queries x keys of a program's tile, heads that share it."""
        fwd, bwd = self.forward, self.backward
        return (
            f"forward {CONSUMERS * fwd.group}x{fwd.block_kv} x {fwd.heads} heads, "
            f"backward {bwd.block_q}x{bwd.block_kv}"
        )


def choose_tiles(num_heads: int, num_kv_heads: int, head_dim: int) -> Tiles:
    """The tile sizes for these heads.

    128 keys a tile is the most that two computing warpgroups hold without register spills at
    head_dim 128; two stages of it are what shared memory then allows. At head_dim 64 the backward
    takes 128 queries, because dQ is split between the warpgroups by rows and wgmma wants 64.
    """
    small = head_dim == 64
    heads, stages = math.gcd(num_heads // num_kv_heads, 8), 4 if small else 2
    return Tiles(
        forward=ForwardTiles(heads=heads, block_kv=128, stages=stages),
        dq=DqTiles(heads=heads, block_kv=128, stages=stages),
        backward=BackwardTiles(block_q=128 if small else 64, block_kv=128, stages=2),
    )
