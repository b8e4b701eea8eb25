"""The remat that is chosen for a device, and the plan of a run by its flags."""

import dataclasses

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from models.config import PRESETS
from train.config.config import Config
from train.config.sections import OptimConfig
from train.distributed.mesh import AXES
from train.memory.plan import GiB
from train.memory.sizing import MARGIN, REMAT_BY_SPEED, TILE_SIZE, Sizing, in_scan

CONFIG = Config(model="internlm2-1.8b", seq_len=32768)
LONG = Sizing(
    model=PRESETS["internlm2-1.8b"],
    mesh=AbstractMesh((1,) * len(AXES), AXES),
    rows=1,
    dtype=jnp.dtype("bfloat16"),
    attn="pallas",
    host=100 * GiB,
)
SMALL = {"param_dtype": "bf16", "optim": OptimConfig(moment_dtype="int8")}


def test_by_device():
    """15% of the memory are left, for XLA too, while there is a choice."""
    for remat in REMAT_BY_SPEED:
        total = LONG.plan(CONFIG, remat).total
        assert LONG.fastest(CONFIG, int(total / MARGIN) + 1) == (remat, None)
    assert LONG.fastest(CONFIG, total) == ("full", None)


def test_a_scan_takes_no_mix():
    """It would need a stack for each policy."""
    config = dataclasses.replace(CONFIG, scan_layers=True)
    chosen = {LONG.fastest(config, gib * GiB)[0] for gib in range(30, 130, 4)}
    assert chosen >= {"dots", "attention", "full"} and not any("dots," in remat for remat in chosen)


def test_rows_that_do_not_fit_are_tiled_then_sent_to_the_host():
    """Of 1.8B at 32k the weights and moments are most: tiles alone help little."""
    full = LONG.plan(CONFIG, "full").total
    remat, tile_size = LONG.fastest(CONFIG, full - 1)
    assert tile_size == TILE_SIZE and LONG.plan(CONFIG, remat, tile_size).total < full


@pytest.mark.parametrize(
    ("seq_len", "host", "remat"),
    [
        (131_072, 100, "offload,attention,attention,attention"),
        (131_072, 1, "attention,full"),
        (262_144, 100, "offload,offload,offload,attention"),
        (262_144, 70, "offload,full"),
        (393_216, 100, "offload,offload_input,offload_input,full"),
        (393_216, 1, None),
    ],
)
def test_long_rows_mix_policies_by_device_and_host(seq_len, host, remat):
    """7B on an H200: attention is recomputed in as few layers as device and host allow."""
    sizing = dataclasses.replace(LONG, model=PRESETS["internlm2-7b"], host=host * GiB)
    config = Config(model="internlm2-7b", seq_len=seq_len, **SMALL)
    way = sizing.fastest(config, 129 * GiB)
    advice = sizing.memory_advice(config, way, 129 * GiB)
    if remat is None:
        assert "no flag makes it fit" in advice
    else:
        assert (way, advice) == ((remat, TILE_SIZE), None)
        plan = sizing.plan(config, *way)
        assert plan.total <= 0.85 * 129 * GiB and plan.host <= host * GiB


def test_flags_that_are_given_are_kept():
    given = dataclasses.replace(CONFIG, remat="attention", tile_size=4096)
    assert LONG.fastest(given, 130 * GiB) == ("attention", 4096)
    assert LONG.fastest(dataclasses.replace(given, remat=None), 130 * GiB) == ("attention", 4096)
    with pytest.raises(ValueError, match="tile_size=4096 does not divide a row of 32,771 tokens"):
        LONG.fastest(dataclasses.replace(given, seq_len=32771), 130 * GiB)


def test_parts_of_a_step_need_less():
    eight = dataclasses.replace(LONG, rows=8)
    parts = [
        eight.plan(dataclasses.replace(CONFIG, grad_accum=grad_accum), "full").total
        for grad_accum in (1, 2, 4, 8)
    ]
    assert parts == sorted(parts, reverse=True) and len({*parts}) == 4


@pytest.mark.parametrize(
    ("remat", "asked", "on_gpu", "scan"),
    [
        ("dots", None, True, False),
        ("dots", None, False, True),
        ("dots", True, True, True),
        ("offload", None, True, True),  # unrolled, XLA would not send it to the host in time
        ("offload", True, True, True),
        ("offload_input,full", None, True, True),
        ("offload", False, False, False),
    ],
)
def test_layers_are_a_loop_where_that_is_better(remat, asked, on_gpu, scan):
    assert in_scan(asked, remat, on_gpu=on_gpu, seq_len=32_768) is scan


def test_layers_of_long_rows_are_a_loop():
    assert in_scan(None, "full", on_gpu=True, seq_len=65_536)
    assert in_scan(None, "attention", on_gpu=True, seq_len=65_536)
    # A scan would copy the saved matrix products.
    assert not in_scan(None, "dots,attention", on_gpu=True, seq_len=65_536)
    assert not in_scan(None, "qkv", on_gpu=True, seq_len=65_536)
    assert not in_scan(False, "full", on_gpu=True, seq_len=65_536)


def test_offload_of_unrolled_layers_is_refused():
    with pytest.raises(ValueError, match="--scan_layers=False with --remat=offload would hold"):
        in_scan(False, "offload", on_gpu=True, seq_len=512)
