"""Tile sizes: sound for any heads, and those of the table where there is one."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from jaxattn.pallas.tiles import CHIPS, Tiles, scratch_bytes
from jaxattn.pallas.wgmma import tiles
from jaxattn.pallas.wgmma.backward import dq_kernel as backward_dq
from jaxattn.pallas.wgmma.backward import kernel as backward
from jaxattn.pallas.wgmma.forward import kernel as forward
from jaxattn.pallas.wgmma.tiles import BackwardTiles, ForwardTiles

HEADS = [(k * group, k) for k in range(1, 65) for group in range(1, 64 // k + 1)]


def _check(choice: Tiles, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    bf16 = jnp.dtype(jnp.bfloat16)
    for scratch in (
        forward.scratch(head_dim, bf16, choice.forward),
        backward.scratch(head_dim, bf16, choice.backward),
        backward.scratch(head_dim, bf16, choice.backward, with_dq=False),
        backward_dq.scratch(head_dim, bf16, choice.dq),
    ):
        assert scratch_bytes(scratch) <= CHIPS["9.0"].smem
    assert (num_heads // num_kv_heads) % choice.forward.qheads_per_tile == 0
    assert choice.forward.warpgroup_queries % 8 == 0, "the TMA needs 8 rows"
    assert choice.backward.block_kv == 64 * tiles.CONSUMERS
    assert backward.dq_part(head_dim, choice.backward)[0] % 64 == 0, "rows of a wgmma"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rule_is_sound_for_any_heads(head_dim):
    """Up to 64 query heads in groups of any size: within shared memory, whole heads and rows."""
    for num_heads, num_kv_heads in HEADS:
        choice = tiles.rule_tiles(num_heads, num_kv_heads, head_dim)
        _check(choice, num_heads, num_kv_heads, head_dim)


def test_shipped_table_is_sound():
    """Every tile choice in the table obeys what the rule obeys."""
    for row in json.loads(tiles.TABLE.read_text()):
        heads = row["num_heads"], row["num_kv_heads"], row["head_dim"]
        choice = tiles.choose_tiles(*heads)
        assert dataclasses.asdict(choice.forward) == row["forward"]
        _check(choice, *heads)


def test_table_comes_before_the_rule(monkeypatch, tmp_path):
    """Heads in the table get its tiles, others the rule's; a missing table is an empty one."""
    path = tmp_path / "tuned.json"
    row = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "forward": {"qheads_per_tile": 2, "block_kv": 64, "stages": 4},
        "backward": {"block_q": 64, "block_kv": 128, "stages": 2},
        "device": "NVIDIA H200",
    }
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "none.json")
    assert tiles.choose_tiles(32, 8, 128) == tiles.rule_tiles(32, 8, 128)
    path.write_text(json.dumps([row]))
    monkeypatch.setattr(tiles, "TABLE", path)
    assert tiles.choose_tiles(32, 8, 128) == Tiles(
        family="wgmma",
        forward=ForwardTiles(qheads_per_tile=2, block_kv=64, stages=4),
        backward=BackwardTiles(block_q=64, block_kv=128, stages=2),
        dq=tiles.rule_tiles(32, 8, 128).dq,
    )
    assert tiles.choose_tiles(16, 8, 128) == tiles.rule_tiles(16, 8, 128)
    assert tiles.choose_tiles(32, 8, 64) == tiles.rule_tiles(32, 8, 64)
