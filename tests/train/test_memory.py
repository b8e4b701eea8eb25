"""The plan counts bytes that can be counted by hand, and its refusals say what to change."""

import jax
import pytest
from flax import nnx

from models.config import PRESETS
from models.internlm2 import InternLM2
from train import memory
from train.mesh import make_mesh
from train.optim import optimizer
from train.sections import MeshConfig, OptimConfig
from train.state import abstract_state

BIG = PRESETS["internlm2-1.8b"]
GiB = 2**30


def plan(model=BIG, devices=1, **kwargs):
    sizes = kwargs.pop("sizes", MeshConfig())
    options = {"rows": 1, "seq_len": 32768, "accum": 1, "remat": "full", "itemsize": 2}
    options |= {"attn": "pallas"} | kwargs
    return memory.plan(model, make_mesh(sizes, jax.devices()[:devices]), **options)


def test_1_8b_on_one_gpu():
    """fp32 weights and moments, bf16 copies and gradients: 18 bytes a parameter in all."""
    p = plan()
    n = BIG.num_params()
    assert (p.weights, p.optimizer, p.gradients) == (6 * n, 8 * n, 2 * n)
    assert p.gathered == p.scores == 0
    assert 30 * GiB < p.total < 40 * GiB  # a plain step was measured at 34 GiB
    assert plan(accum=2).gradients == 6 * n


def test_more_is_kept_with_less_remat():
    totals = [plan(remat=remat).activations for remat in ("full", "attention", "qkv", "none")]
    assert totals == sorted(totals) and len(set(totals)) == 4
    assert plan(remat="attention", attn="xla") == plan(remat="full", attn="xla")


def test_devices_share():
    one, eight = plan(), plan(devices=8, rows=8)
    assert eight.optimizer == one.optimizer // 8
    assert eight.activations == one.activations  # a row each
    assert eight.gathered > 0
    assert plan(devices=8, sizes=MeshConfig(fsdp=1, tensor=8)).logits < one.logits


def test_eager_scores_are_counted():
    assert plan(attn="eager").scores >= 16 * 32768**2 * 4
    assert (
        plan(attn="eager", rows=8, seq_len=512).scores == plan(attn="eager", seq_len=512).scores * 8
    )


@pytest.mark.parametrize(
    ("kwargs", "gib", "remedy"),
    [
        ({"attn": "eager"}, 80, "take --attn=pallas or --attn=xla"),
        ({}, 20, "more devices .* or a smaller --model"),
        ({"rows": 8}, 40, "smaller --batch_size, or more parts: --accum=2"),
        ({}, 30, "shorter --seq_len"),
    ],
)
def test_refusal_names_the_remedy(kwargs, gib, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        memory.check_fits(plan(**kwargs), int(gib * GiB), rows=kwargs.get("rows", 1), accum=1)
    assert f"the device has {gib:.2f} GiB" in str(error.value)


def test_what_fits_is_not_refused():
    memory.check_fits(plan(), 130 * GiB, rows=1, accum=1)


def test_state_takes_what_is_planned(tiny):
    """The arrays of the state, against weights and moments of the plan."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer(OptimConfig(), 1e-3, 10)
    _, like = abstract_state(lambda: InternLM2(tiny, rngs=nnx.Rngs(0)), tx, mesh)
    ours = plan(tiny, rows=2, seq_len=64, itemsize=4, attn="xla")
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(like))
    assert held == ours.weights + ours.optimizer + 3 * 4  # three counts of steps
