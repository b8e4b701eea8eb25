"""The order in which the programs of the mma backward kernel begin."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.bench.shapes import SHAPES
from jaxattn.block_map import WorkField
from jaxattn.pallas import op
from jaxattn.pallas.mma.backward import work_of

MULTIPROCESSORS = 132


@pytest.mark.parametrize(("key_tiles", "kv_heads"), [(5, 1), (5, 2), (3, 4)])
def test_every_key_tile_of_every_head_has_one_program(key_tiles, kv_heads):
    entries, heads = work_of(jnp.arange(key_tiles * kv_heads), key_tiles, kv_heads)
    found = sorted(zip(entries.tolist(), heads.tolist(), strict=True))
    assert found == [(entry, head) for entry in range(key_tiles) for head in range(kv_heads)]


@pytest.mark.parametrize("name", ["7b_32k_packed", "7b_32k_packed_short", "1.8b_32k_causal"])
def test_multiprocessors_end_together(name):
    """Each multiprocessor takes the next program when it is free, as the GPU does."""
    shape = SHAPES[name]
    q, k = (
        jax.ShapeDtypeStruct((1, shape.length, heads, shape.head_dim), jnp.bfloat16)
        for heads in (shape.heads, shape.kv_heads)
    )
    plan = op.prepare(shape.mask(), q, k, family="mma", capability="9.0").plan
    tiles = np.asarray(plan.keys.work[:, 0, WorkField.COUNT])
    entries, _ = work_of(jnp.arange(len(tiles) * shape.kv_heads), len(tiles), shape.kv_heads)
    ends = [0] * MULTIPROCESSORS
    for entry in np.asarray(entries):
        heapq.heapreplace(ends, ends[0] + int(tiles[entry]))
    assert max(ends) < 1.03 * np.mean(ends)
