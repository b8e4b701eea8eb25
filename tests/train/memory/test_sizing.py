"""The remat that is chosen for a device, and the plan of a run by its flags."""

import dataclasses

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from models.config import PRESETS
from train.config.config import Config
from train.distributed.mesh import AXES
from train.memory.plan import GiB
from train.memory.sizing import REMAT_BY_SPEED, Sizing, choose_remat, in_scan

CONFIG = Config(model="internlm2-1.8b", seq_len=32768)
LONG = Sizing(
    model=PRESETS["internlm2-1.8b"],
    mesh=AbstractMesh((1,) * len(AXES), AXES),
    rows=1,
    dtype=jnp.dtype("bfloat16"),
    attn="pallas",
)


def test_the_fastest_that_fits():
    need = {"dots": 70, "attention": 37, "full": 34}
    assert choose_remat(need, 139) == "dots"
    assert choose_remat(need, 81) == "attention"  # 15% are left, for XLA too
    assert choose_remat(need, 30) == "full"  # which the memory check then refuses


def test_by_device():
    chosen = [LONG.fastest_remat(CONFIG, gib * GiB) for gib in (130, 60, 38)]
    assert chosen == [*REMAT_BY_SPEED]


def test_parts_of_a_step_need_less():
    eight = dataclasses.replace(LONG, rows=8)
    parts = [
        eight.plan(dataclasses.replace(CONFIG, grad_accum=grad_accum), remat="full").total
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
        ("offload", False, False, False),
    ],
)
def test_layers_are_a_loop_where_that_is_better(remat, asked, on_gpu, scan):
    assert in_scan(asked, remat, on_gpu=on_gpu) is scan


def test_offload_of_unrolled_layers_is_refused():
    with pytest.raises(ValueError, match="--scan_layers=False with --remat=offload would hold"):
        in_scan(False, "offload", on_gpu=True)
