"""Tile sizes of the mma.sync kernels: within each chip's shared memory, and as a table says."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from jaxattn.pallas.mma import backward, dq_kernel, forward
from jaxattn.pallas.mma import tiles as mma_tiles
from jaxattn.pallas.mma.tiles import RESERVED_SMEM, choose_tiles, rule_tiles
from jaxattn.pallas.tiles import CHIPS, scratch_bytes

BF16 = jnp.dtype(jnp.bfloat16)


@pytest.mark.parametrize("heads", [(8, 8), (16, 8), (32, 8), (48, 8), (8, 1)])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", CHIPS)
def test_rule_fits_every_chip(capability, head_dim, heads):
    """All kernels fit; two programs of the forward kernel share a multiprocessor."""
    chip, tiles = CHIPS[capability], rule_tiles(*heads, head_dim, capability)
    fwd = scratch_bytes(forward.scratch(head_dim, BF16, tiles.forward))
    dq = scratch_bytes(dq_kernel.scratch(head_dim, BF16, tiles.dq))
    bwd = scratch_bytes(backward.scratch(head_dim, BF16, tiles.backward))
    assert 2 * (fwd + RESERVED_SMEM) <= chip.smem_total
    assert max(dq, bwd) <= chip.smem
    assert (heads[0] // heads[1]) % tiles.forward.qheads_per_tile == 0
    # Rows that a warpgroup copies at a time belong to one head.
    for part in (tiles.forward, tiles.dq):
        assert part.queries % (1024 // head_dim) == 0


def test_vector_adds_are_for_chips_that_have_them():
    """red.v4.f32 exists from sm_90 on."""
    vector = {c: rule_tiles(16, 8, 128, c).backward.vector for c in CHIPS}
    assert vector == {"8.0": False, "8.6": False, "8.9": False, "9.0": True, "12.0": True}


def test_tuned_tiles(monkeypatch, tmp_path):
    """A table's row replaces the rule on its chip; no table, no tuned tiles."""
    rule = rule_tiles(16, 8, 128, "8.0")
    other = dataclasses.replace(rule.forward, stages=2)
    row = {"capability": "8.0", "num_heads": 16, "num_kv_heads": 8, "head_dim": 128}
    row |= {"forward": dataclasses.asdict(other), "backward": dataclasses.asdict(rule.backward)}
    monkeypatch.setattr(mma_tiles, "TABLE", tmp_path / "none.json")
    assert choose_tiles(16, 8, 128, "8.0") == rule
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps([row]))
    monkeypatch.setattr(mma_tiles, "TABLE", path)
    assert choose_tiles(16, 8, 128, "8.0") == dataclasses.replace(rule, forward=other)
    assert choose_tiles(16, 8, 128, "8.6") == rule_tiles(16, 8, 128, "8.6")
