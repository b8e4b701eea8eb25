"""A run: its losses are known, and being killed, stopped or run twice does not change them."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from train import stepping
from train.checkpoint import Checkpoints
from train.loop import run

GOLDEN = Path(__file__).parent / "golden_losses.json"

KILLED = """
import json, os, signal, sys
from models.config import PRESETS, ModelConfig
from train.main import main
from train.metrics import Metrics

record = Metrics.record

def record_or_die(self, step, *rest):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return record(self, step, *rest)

Metrics.record = record_or_die
PRESETS["tiny"] = ModelConfig(**json.loads(sys.argv[1]))
main(sys.argv[2:])
"""


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def params(out: Path, step: int):
    """The parameters in a checkpoint, as numpy, without the code under test."""
    with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")
        state = reader.restore(out / "checkpoints" / str(step) / "state")
    return jax.tree.map(np.asarray, state["params"])


def same_end(out: Path, finished: Path) -> None:
    assert losses(out) == losses(finished)
    jax.tree.map(np.testing.assert_array_equal, params(out, 8), params(finished, 8))


def test_golden_losses(finished):
    """Any change of numerics, data order or initial weights shows here.

    Written by this run on a CPU of 8 fake devices; another CPU's float32 sums differ by about 1e-6.
    """
    golden = json.loads(GOLDEN.read_text())
    np.testing.assert_allclose(losses(finished), golden, rtol=1e-4)
    assert golden[-1] < golden[0]


def test_leaves_checkpoints_metrics_and_a_sample(finished):
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["6", "8"]
    assert "|" in (finished / "sample.txt").read_text()
    assert sorted(p.name for p in finished.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "sample.txt",
    ]


def test_says_what_it_does(finished):
    """The plan, the data, what attention runs and why (once), and how long compiling took."""
    said = finished.with_suffix(".log").read_text()
    line = "dispatch internlm2 attn forward: xla (asked for as sdpa) on cpu; tiles "
    assert said.count(line) == 1
    assert "memory plan:" in said and "compiled the step in" in said and "380,812 tokens" in said


def test_killed_run_ends_bitwise_as_if_it_had_not_been(tiny, tiny_run, finished, tmp_path, capsys):
    """SIGKILL in step 5, at the earliest right after the checkpoint of step 3 was begun."""
    out = tmp_path / "killed"
    same = [f"--{k}={v}" for k, v in vars(tiny_run(out)).items() if type(v) in (str, int)]
    arguments = [json.dumps(vars(tiny)), *same, "--optim.lr=1e-2"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Checkpoints(out, keep=2).latest in (None, 3)
    run(tiny_run(out))
    same_end(out, finished)


def test_sigterm_saves_and_the_next_run_goes_on(tiny_run, finished, tmp_path, capsys, monkeypatch):
    """Two signals: the run ends after the step, with a checkpoint of exactly that step."""
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        put_batch = stepping.put_batch
        calls = []

        def put_and_signal(*args, **kwargs):
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return put_batch(*args, **kwargs)

        patch.setattr(stepping, "put_batch", put_and_signal)
        run(tiny_run(out))
    assert "stopped by SIGTERM after step 5; the same command goes on" in capsys.readouterr().out
    assert Checkpoints(out, keep=2).latest == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(tiny_run(out))
    assert f"resuming from step 5 of {out}" in capsys.readouterr().out
    same_end(out, finished)


def test_finished_run_says_so_and_trains_nothing(tiny_run, finished, capsys):
    before = losses(finished)
    run(tiny_run(finished))
    said = capsys.readouterr().out
    assert f"resuming from step 8 of {finished}" in said
    assert "all 8 steps are done: to train on, give more --steps" in said
    assert "sample after 8 steps" in said and "compiled" not in said
    assert losses(finished) == before


def test_a_loss_that_is_not_finite_stops_the_run(tiny_run, tmp_path, monkeypatch):
    """The checkpoint before it stays the latest."""
    put_batch = stepping.put_batch
    calls = []

    def put_nan(batch, **kwargs):
        calls.append(1)
        mask = batch.loss_mask * np.float32(np.nan if len(calls) == 5 else 1)
        return put_batch(batch._replace(loss_mask=mask), **kwargs)

    monkeypatch.setattr(stepping, "put_batch", put_nan)
    with pytest.raises(FloatingPointError, match="step 5: loss nan.*smaller --optim.lr"):
        run(tiny_run(tmp_path / "out"))
    checkpoints = Checkpoints(tmp_path / "out", keep=2)
    assert checkpoints.latest == 3
