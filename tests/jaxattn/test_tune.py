"""The tuner: candidates within the budget, wrong ones dropped, the best written and then used."""

import dataclasses
import json
import types

import jax.numpy as jnp
import pytest

from jaxattn import eager, tune, tune_candidates
from jaxattn.bench_shapes import Shape
from jaxattn.pallas import tiles
from jaxattn.pallas.tiles import SMEM_BYTES, ForwardTiles
from tests.jaxattn.interpret import interpreted

SMALL = Shape(batch=1, length=128, heads=4, kv_heads=2, head_dim=64, documents=(40.0, 0.7))
LAYOUT = (4, 2, 64)


@pytest.mark.parametrize("layout", [(16, 8, 128), (48, 8, 128), (8, 8, 64), (32, 8, 64)])
def test_rule_is_among_the_candidates(layout):
    """The search starts from the rule and leaves out only what has a reason."""
    rule = tiles.rule_tiles(*layout)
    candidates = tune_candidates.forward_candidates(layout)
    assert rule.forward in candidates
    assert rule.backward in tune_candidates.backward_candidates()
    for part in (rule.forward, rule.backward):
        assert tune_candidates.why_not(part, layout) is None
    for part in candidates:
        fits = tune_candidates.smem_bytes(part, layout) <= SMEM_BYTES
        assert fits == (tune_candidates.why_not(part, layout) is None)
        assert layout[0] // layout[1] % part.heads == 0


def test_dry_run_lists_candidates_without_a_gpu(capsys, tmp_path):
    """Each with its bytes, or the reason why it is not tried; nothing is written."""
    out = tmp_path / "tuned.json"
    assert tune.main(["--dry_run", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("query heads") == 3
    assert "forward 4 heads, 64 keys, 4 stages: " in printed
    assert "no, needs" in printed
    assert not out.exists()


def test_without_a_gpu_it_says_what_it_needs(capsys):
    """Not a traceback, and not a table of a CPU's times."""
    assert tune.main([]) == 1
    assert "Hopper" in capsys.readouterr().err


@pytest.fixture
def fake_gpu(monkeypatch):
    """Attention by eager; 64 keys a tile are twice as fast, 192 are wrong, 4 stages fail."""
    now = {}

    def attention(q, k, v, mask, *, scale):
        now["tiles"] = forward = mask.plan.tiles.forward
        if forward.stages == 4:
            raise RuntimeError("too many stages\nand more")
        out = eager.attention(q, k, v, mask, scale=scale)
        return out * jnp.asarray(1.1 if forward.block_kv == 192 else 1.0, out.dtype)

    def milliseconds(run, wait):
        wait(run())
        return {64: 1.0, 128: 2.0}[now["tiles"].block_kv]

    def planned(shape, tiles):
        return dataclasses.replace(shape.mask(), plan=types.SimpleNamespace(tiles=tiles))

    monkeypatch.setattr(tune, "planned", planned)
    monkeypatch.setattr(tune.op, "attention", attention)
    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "_forward", tune._forward.__wrapped__)
    monkeypatch.setattr(tune, "_both", tune._both.__wrapped__)


def test_search_drops_what_is_wrong_and_keeps_the_fastest(fake_gpu, capsys):
    """Candidates that fail or differ are named and left out, and the fastest other is chosen."""
    rule = dataclasses.replace(
        tiles.rule_tiles(*LAYOUT), forward=ForwardTiles(heads=2, block_kv=128, stages=2)
    )
    candidates = [
        dataclasses.replace(rule, forward=part)
        for part in tune_candidates.forward_candidates(LAYOUT)
        if part.heads == 2
    ]
    best, ms = tune.fastest(tune._forward, rule, candidates, {"small": SMALL})
    assert best.forward.block_kv == 64 and best.forward.stages < 4
    assert ms == {"small": [2.0, 1.0]}
    printed = capsys.readouterr().out
    dropped = [line for line in printed.splitlines() if "192 keys, 2 stages" in line]
    assert dropped and all("out, o differs by 10." in line for line in dropped)
    assert "out, cannot run: too many stages\n" in printed


def test_row_is_written_and_used(monkeypatch, tmp_path):
    """A new row takes the place of the old one of its layout, and choose_tiles follows it."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tiles, "TABLE", path)
    row = dict(zip(tune._KEY, LAYOUT, strict=True))
    rule = tiles.rule_tiles(*LAYOUT)
    row |= {"backward": dataclasses.asdict(rule.backward)}
    for keys in (128, 64):
        forward = ForwardTiles(heads=1, block_kv=keys, stages=3)
        tune.write(row | {"forward": dataclasses.asdict(forward)}, path)
        tune.write(row | {"forward": dataclasses.asdict(forward), "num_heads": 2}, path)
    assert len(json.loads(path.read_text())) == 2
    assert tiles.choose_tiles(*LAYOUT).forward == forward


def test_kernels_run_with_a_plan_for_other_tiles():
    """What the tuner times is the kernel with the candidate's tiles, and it is right."""
    arrays = tune.inputs(SMALL)
    rule = tiles.rule_tiles(*LAYOUT)
    other = dataclasses.replace(rule, forward=ForwardTiles(heads=1, block_kv=64, stages=2))
    with interpreted():
        expected = tune._forward(*arrays, tune.planned(SMALL, rule))
        found = tune._forward(*arrays, tune.planned(SMALL, other))
    assert tune.difference(found, expected) is None
    assert tune.difference((found[0] * 2,), expected) is not None
