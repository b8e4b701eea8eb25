"""The tuner: candidates within the budget, wrong ones dropped, the best written and then used."""

import dataclasses
import json
import threading

import jax
import jax.numpy as jnp
import pytest

from jaxattn import eager, tune
from jaxattn.bench.shapes import Shape
from jaxattn.pallas.tiles import CHIPS, Tiles
from jaxattn.pallas.wgmma import tiles
from jaxattn.pallas.wgmma.tiles import ForwardTiles
from jaxattn.tune_candidates import smem_bytes
from tests.jaxattn.interpret import interpreted

SMALL = Shape(batch=1, length=128, heads=4, kv_heads=2, head_dim=64, documents=(40.0, 0.7))
LAYOUT = (4, 2, 64)


@pytest.mark.parametrize("layout", [(16, 8, 128), (48, 8, 128), (8, 8, 64), (32, 8, 64)])
def test_rule_is_among_the_candidates(layout):
    """The search starts from the rule and leaves out only what has a reason."""
    search = tune.search_of("wgmma", "9.0")
    rule, candidates = search.rule(layout), search.forward(layout)
    assert rule == tiles.rule_tiles(*layout)
    assert rule.forward in candidates
    assert rule.backward in search.backward(layout)
    for part in (rule.forward, rule.backward):
        assert search.why_not(part, layout) is None
    for part in candidates:
        fits = smem_bytes(part, layout) <= CHIPS["9.0"].smem
        assert fits == (search.why_not(part, layout) is None)
        assert layout[0] // layout[1] % part.qheads_per_tile == 0


@pytest.mark.parametrize(
    "layout", [(16, 8, 128), (48, 8, 128), (8, 1, 128), (8, 8, 64), (8, 1, 64)]
)
@pytest.mark.parametrize("capability", CHIPS)
def test_rule_of_mma_is_among_the_candidates(layout, capability):
    """On every chip the search starts from the rule, which is one of those that fit."""
    search = tune.search_of("mma", capability)
    rule = search.rule(layout)
    assert search.fields == {"capability": capability}
    for part, candidates in ((rule.forward, search.forward), (rule.backward, search.backward)):
        assert part in candidates(layout)
        assert search.why_not(part, layout) is None


def test_dry_run_lists_the_candidates_of_another_gpu(capsys):
    """Those of its kernels and shared memory; without --dry_run it has nothing to time them on."""
    assert tune.main(["--dry_run", "--gpu", "rtx4090"]) == 0
    printed = capsys.readouterr().out
    assert "rule: forward 32x64 x 2 heads, backward 64x64" in printed
    assert "forward 64 rows, 2 heads, 64 keys, 1 stage: 49,664 bytes" in printed
    assert "backward 64 queries, 128 keys, 1 stage: no, needs " in printed
    assert tune.main(["--gpu", "rtx4090"]) == 1
    assert "add --dry_run" in capsys.readouterr().err


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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class FakePlan:
    """Says which tiles to use, and nothing else."""

    tiles: Tiles


@pytest.fixture
def fake_gpu(monkeypatch):
    """Attention by eager; 64 keys a tile are twice as fast, 192 are wrong, 4 stages fail."""
    now = {}

    def attention(q, k, v, mask, *, scale, family):
        assert family == "wgmma"
        forward = mask.plan.tiles.forward
        if forward.stages == 4:
            raise RuntimeError("too many stages\nand more")
        jax.debug.callback(lambda: now.update(tiles=forward))
        out = eager.attention(q, k, v, mask, scale=scale)
        return out * jnp.asarray(1.1 if forward.block_kv == 192 else 1.0, out.dtype)

    def milliseconds(run, wait):
        wait(run())
        jax.effects_barrier()
        return {64: 1.0, 128: 2.0}[now["tiles"].block_kv]

    def planned(shape, tiles):
        return dataclasses.replace(shape.mask(), plan=FakePlan(tiles))

    def anew(run):
        """Trace again: another test has traced with another fake."""
        return jax.jit(lambda *args: run.__wrapped__(*args))

    monkeypatch.setattr(tune, "planned", planned)
    monkeypatch.setattr(tune.op, "attention", attention)
    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "_forward", anew(tune._forward))
    monkeypatch.setattr(tune, "_both", anew(tune._both))


def test_search_drops_what_is_wrong_and_keeps_the_fastest(fake_gpu, capsys):
    """Candidates that fail or differ are named and left out, and the fastest other is chosen."""
    rule = dataclasses.replace(
        tiles.rule_tiles(*LAYOUT), forward=ForwardTiles(qheads_per_tile=2, block_kv=128, stages=2)
    )
    candidates = [
        dataclasses.replace(rule, forward=part)
        for part in tune.search_of("wgmma", "9.0").forward(LAYOUT)
        if part.qheads_per_tile == 2
    ]
    best, ms = tune.fastest(tune._forward, rule, candidates, {"small": SMALL})
    assert best.forward.block_kv == 64 and best.forward.stages < 4
    assert ms == {"small": [2.0, 1.0]}
    printed = capsys.readouterr().out
    dropped = [line for line in printed.splitlines() if "192 keys, 2 stages" in line]
    assert dropped and all("dropped: o differs by 10." in line for line in dropped)
    assert "dropped: cannot run: too many stages\n" in printed


def some_tiles(count, stages=2):
    """Return tiles that differ in their forward part."""
    rule = tiles.rule_tiles(*LAYOUT)
    return [
        dataclasses.replace(
            rule, forward=ForwardTiles(qheads_per_tile=2, block_kv=keys, stages=stages)
        )
        for keys in (64, 128, 192, 256)[:count]
    ]


def test_candidates_compile_at_the_same_time(fake_gpu, monkeypatch):
    """Each of two waits, in its thread, until the other has begun too."""
    together, planned = threading.Barrier(2, timeout=30), tune.planned

    def patient(*args):
        together.wait()
        return planned(*args)

    monkeypatch.setattr(tune, "planned", patient)
    monkeypatch.setattr(tune.os, "cpu_count", lambda: 2)
    found = tune.compiled(tune._forward, tune.inputs(SMALL), SMALL, some_tiles(4))
    assert [mask.result().plan.tiles for mask in found.values()] == list(found) == some_tiles(4)


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (192, 16), (None, 1)])
def test_workers_are_bounded(fake_gpu, monkeypatch, cores, workers):
    asked = []

    class Pool(tune.ThreadPoolExecutor):
        def __init__(self, count):
            asked.append(count)
            super().__init__(count)

    monkeypatch.setattr(tune, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(tune.os, "cpu_count", lambda: cores)
    tune.compiled(tune._forward, tune.inputs(SMALL), SMALL, [])
    assert asked == [workers]


@pytest.mark.parametrize("name", ["_forward", "_both"])
def test_a_call_uses_what_was_compiled(fake_gpu, name):
    """Neither is traced nor compiled again: what is timed runs at once."""
    run, arrays, events = getattr(tune, name), tune.inputs(SMALL), []
    found = tune.compiled(run, arrays, SMALL, some_tiles(2))
    masks = [mask.result() for mask in found.values()]

    def listen(event, seconds, **_):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for mask in masks:
            jax.block_until_ready(run(*arrays, mask))
        assert not [event for event in events if "compile" in event or "trace" in event]
        run(*(2 * x for x in arrays[:1]), *arrays[1:], tune.planned(SMALL, some_tiles(3)[2]))
        assert [event for event in events if "compile" in event]  # one that was not
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_what_does_not_compile_says_so_when_its_turn_comes(fake_gpu):
    """The others are compiled all the same."""
    [good], [bad] = some_tiles(1), some_tiles(1, stages=4)
    found = tune.compiled(tune._forward, tune.inputs(SMALL), SMALL, [bad, good])
    assert found[good].result().plan.tiles == good
    with pytest.raises(RuntimeError, match="too many stages"):
        found[bad].result()


def test_row_is_written_and_used(monkeypatch, tmp_path):
    """A new row takes the place of the old one of its layout, and choose_tiles follows it."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tiles, "TABLE", path)
    row = dict(zip(tune._LAYOUT, LAYOUT, strict=True))
    rule = tiles.rule_tiles(*LAYOUT)
    row |= {"backward": dataclasses.asdict(rule.backward)}
    for keys in (128, 64):
        forward = ForwardTiles(qheads_per_tile=1, block_kv=keys, stages=3)
        tune.write(row | {"forward": dataclasses.asdict(forward)}, path)
        tune.write(row | {"forward": dataclasses.asdict(forward), "num_heads": 2}, path)
    assert len(json.loads(path.read_text())) == 2
    assert tiles.choose_tiles(*LAYOUT).forward == forward


def test_kernels_run_with_a_plan_for_other_tiles():
    """The tuner times the kernel with the tiles of the candidate, and its result is right."""
    arrays = tune.inputs(SMALL)
    rule = tiles.rule_tiles(*LAYOUT)
    other = dataclasses.replace(
        rule, forward=ForwardTiles(qheads_per_tile=1, block_kv=64, stages=2)
    )
    with interpreted():
        expected = tune._forward(*arrays, tune.planned(SMALL, rule))
        found = tune._forward(*arrays, tune.planned(SMALL, other))
    assert tune.difference(found, expected) is None
    assert tune.difference((found[0] * 2,), expected) is not None
