"""The remedy is the cheapest one that fits, and is checked against the plan itself."""

import dataclasses

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from models.config import PRESETS
from train.config.config import Config
from train.config.sections import OptimConfig
from train.distributed.mesh import AXES
from train.memory.plan import GiB
from train.memory.sizing import Sizing

MESH = AbstractMesh((1,) * len(AXES), AXES)
BIG, BF16 = PRESETS["internlm2-1.8b"], jnp.dtype("bfloat16")
LONG = Config(model="internlm2-1.8b", seq_len=32768, remat="attention")


def advise(gib, config=LONG, rows=1, attn="pallas"):
    return sizing(rows, attn).memory_advice(config, (config.remat, None), int(gib * GiB))


def need(config=LONG, rows=1, attn="pallas"):
    return sizing(rows, attn).plan(config, config.remat).total / GiB


def sizing(rows, attn):
    return Sizing(model=BIG, mesh=MESH, rows=rows, dtype=BF16, attn=attn, host=20 * GiB)


@pytest.mark.parametrize(
    ("gib", "rows", "config", "flags"),
    [
        (54, 8, LONG, "--grad_accum=4"),  # rows first; 2 parts are not enough
        (32, 1, LONG, "--remat=full"),
        (36, 1, dataclasses.replace(LONG, remat="none"), "--remat=attention"),
        (28, 1, LONG, "--optim.moment_dtype=int8"),
        (18, 1, LONG, "--remat=full --optim.moment_dtype=int8 --param_dtype=bf16"),
        (
            20,
            1,
            dataclasses.replace(LONG, grad_accum=1),
            "--optim.moment_dtype=int8 --param_dtype=bf16",
        ),
    ],
)
def test_cheapest_that_fits(gib, rows, config, flags):
    said = advise(gib, config, rows)
    assert said.startswith(f"take {flags}, which needs ")
    assert float(said.split()[-2]) <= gib


def test_eager_gives_way_to_xla():
    config = dataclasses.replace(LONG, attn="eager", seq_len=4096)
    assert advise(50, config, 8, "eager").startswith("take --attn=xla,")


def test_what_fits_needs_nothing():
    assert advise(need() + 0.01) is None


def test_nothing_helps():
    assert "no flag makes it fit with this optimizer (13" in advise(5)
    assert "more devices (--mesh.fsdp; for long rows --mesh.seq)" in advise(5)


def test_fewest_changes_and_none_that_is_not_needed():
    """Parts of a step and copies to the host are for what smaller states do not cure."""
    config = dataclasses.replace(LONG, seq_len=4096, remat="full")
    most = need(dataclasses.replace(config, param_dtype="bf16"), rows=8)
    said = advise(most - 3, config, 8)
    assert said.startswith("take --optim.moment_dtype=int8, which") or "--param_dtype=bf16" in said
    assert "--remat=offload" not in said and "--grad_accum" not in said


def test_no_change_contradicts_a_flag():
    """Offloading needs the loop over layers, which --scan_layers=False has refused."""
    assert "no flag makes it fit" in advise(5, dataclasses.replace(LONG, scan_layers=False))


def test_lion_is_not_told_to_take_int8():
    config = dataclasses.replace(LONG, optim=OptimConfig(name="lion"))
    assert "int8" not in advise(20, config)
