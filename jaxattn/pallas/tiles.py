"""Tile sizes of the kernels: what they may be, and which are used."""

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

# A warpgroup's share of a score tile: the rows of one wgmma instruction.
WARPGROUP_ROWS = 64
# Warpgroups that compute; one more copies data in.
CONSUMERS = 2
# Shared memory that one program may have on sm_90 (compute capability 9.0), in bytes.
SMEM_BYTES = 232_448
# What `python -m jaxattn.tune` found, where it has run.
TABLE = pathlib.Path(__file__).parents[1] / "tuned.json"


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
    """The tile sizes for these heads: as measured (`jaxattn.tune`), else by rule.

    They decide speed; results differ by rounding only.
    """
    heads = num_heads, num_kv_heads, head_dim
    return tuned_tiles(TABLE).get(heads) or rule_tiles(*heads)


def rule_tiles(num_heads: int, num_kv_heads: int, head_dim: int) -> Tiles:
    """Tile sizes within the shared-memory budget, for any heads.

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


@functools.cache
def tuned_tiles(path: pathlib.Path) -> dict[tuple[int, int, int], Tiles]:
    """Tiles by (query heads, kv heads, head dim) from a table of `jaxattn.tune`.

    Empty where there is no such file yet. The dq kernel of the deterministic backward is not
    tuned: its tiles are the rule's.
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
    """Bytes of shared memory that a kernel's `scratch` asks for, barriers included."""
    total = 0
    for ref in scratch.values():
        if isinstance(ref, plgpu.Barrier):
            total += 8 * int(np.prod(ref.num_barriers))  # of one or several axes
        else:
            total += math.prod(ref.shape) * jnp.dtype(ref.dtype).itemsize
    return total
