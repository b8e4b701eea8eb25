"""A run: its losses are known, and being stopped or run twice does not change them."""

import dataclasses
import errno
import json
import os
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.runs import losses, params
from train.checkpoint.checkpoints import Checkpoints
from train.config.config import Config
from train.config.sections import DataConfig
from train.data.loader import Loader
from train.metrics.records import Records
from train.run import build, loop, train_loop
from train.run.loop import run

GOLDEN = Path(__file__).parent / "golden_losses.json"


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


def test_golden_losses_of_nano(tmp_path, monkeypatch, capsys, compile_fully):
    """The preset, in float32, at the default learning rate: 10 steps of 8 rows of 128.

    With XLA's optimizations, as a user runs it. jax 0.11.2 and 0.12.0 differ by 1e-7; a change of
    numerics in the fifth digit shows.
    """
    monkeypatch.setattr(loop, "write_sample", lambda *_: None)
    out = tmp_path / "nano"
    run(Config(model="nano", attn="xla", seq_len=128, batch_size=8, steps=10, out=str(out)))
    golden = json.loads(GOLDEN.with_name("golden_losses_nano.json").read_text())
    np.testing.assert_allclose(losses(out), golden, rtol=1e-5)


def test_same_seed_same_losses_bit_for_bit(tiny_run, finished, tmp_path):
    """From the beginning, in another directory, on the same machine."""
    run(tiny_run(tmp_path / "again"))
    same_end(tmp_path / "again", finished)


def test_leaves_checkpoints_metrics_and_a_sample(finished):
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["6", "8"]
    assert "|" in (finished / "sample.txt").read_text()
    assert sorted(p.name for p in finished.iterdir()) == [
        ".lock",
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


def test_sigterm_saves_and_the_next_run_goes_on(tiny_run, finished, tmp_path, capsys, monkeypatch):
    """Two signals: the run ends after the step, with a checkpoint of exactly that step."""
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        put_batch = train_loop.put_batch
        calls = []

        def put_and_signal(*args, **kwargs):
            calls.append(1)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return put_batch(*args, **kwargs)

        patch.setattr(train_loop, "put_batch", put_and_signal)
        run(tiny_run(out))
    assert "stopped by SIGTERM after step 5; the same command resumes" in capsys.readouterr().out
    assert Checkpoints(out, keep_last=2).latest == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    half = out / "checkpoints" / "7.orbax-checkpoint-tmp"  # as a kill while saving leaves it
    half.mkdir()
    run(tiny_run(out))
    assert f"resuming from step 5 of {out}" in capsys.readouterr().out
    assert not half.exists()
    same_end(out, finished)


def test_finished_run_says_so_and_trains_nothing(tiny_run, finished, capsys):
    before = losses(finished)
    run(tiny_run(finished))
    said = capsys.readouterr().out
    assert f"resuming from step 8 of {finished}" in said
    assert "all 8 steps are done: to train on, give more --steps" in said
    assert "sample after 8 steps" in said and "compiled" not in said
    assert losses(finished) == before


@pytest.fixture
def nan_in(monkeypatch):
    """Make the loss of chosen batches NaN, counted from 1."""
    put_batch = train_loop.put_batch

    def inject(which) -> None:
        calls = []

        def put(batch, **kwargs):
            calls.append(1)
            mask = batch.loss_mask * np.float32(np.nan if len(calls) in which else 1)
            return put_batch(batch._replace(loss_mask=mask), **kwargs)

        monkeypatch.setattr(train_loop, "put_batch", put)

    return inject


def test_a_nan_in_one_batch_is_skipped_and_said(tiny_run, finished, tmp_path, nan_in, capsys):
    """The losses before it are the usual ones, those after it finite, and training ends."""
    nan_in([5])
    out = tmp_path / "out"
    run(tiny_run(out))
    assert "step 5 skipped: loss nan, gradient norm nan; documents " in capsys.readouterr().out
    assert losses(out)[:4] == losses(finished)[:4] and losses(out)[4] is None
    assert np.isfinite(losses(out)[5:]).all() and losses(out)[7] < losses(out)[0]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0] * 4 + [1] * 4
    [skipped] = (out / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["step"] == 5
    assert json.loads(skipped)["documents"][0].endswith("tinyshakespeare.txt:1")


def test_a_nan_in_every_batch_stops_the_run(tiny_run, tmp_path, nan_in, capsys):
    """After 5 in a row, with the reason; the weights before them are saved, and go on."""
    nan_in(range(2, 100))
    out = tmp_path / "out"
    config = tiny_run(out)
    with pytest.raises(FloatingPointError) as error:
        run(config)
    message = str(error.value)
    assert "5 steps in a row were skipped (--guard.patience=5), the last one step 6: " in message
    assert "loss nan, gradient norm nan; documents " in message and "shakespeare.txt:1" in message
    assert "smaller --optim.lr" in message and "\n" not in message
    assert len((out / "skipped.jsonl").read_text().splitlines()) == 5
    assert Checkpoints(out, keep_last=2).latest == 6
    jax.tree.map(np.testing.assert_array_equal, params(out, 6), params(out, 3))
    nan_in([])
    run(config)
    assert np.isfinite(losses(out)[7])


def test_the_step_after_the_last_straw_is_written_down_too(tiny_run, tmp_path, nan_in):
    """The devices had begun it: it is skipped, saved as such, and its documents are named."""
    nan_in(range(1, 100))
    out = tmp_path / "out"
    with pytest.raises(FloatingPointError, match="the last one step 5: "):
        run(tiny_run(out))
    lines = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert Checkpoints(out, keep_last=2).latest == 6


def test_data_that_stalls_saves_and_stops_the_run(tiny_run, tmp_path, monkeypatch):
    """One line, in bounded time, and what was trained is not lost."""
    make, release = Loader._make, threading.Event()

    def stall(self, row):
        if row >= 4 * 8:
            release.wait(60)
        return make(self, row)

    monkeypatch.setattr(Loader, "_make", stall)
    out = tmp_path / "out"
    config = dataclasses.replace(tiny_run(out), data=DataConfig(stall_minutes=0.02))
    with pytest.raises(TimeoutError, match="no batch in 1.2 seconds; it was to read .*txt:1$"):
        run(config)
    release.set()
    assert Checkpoints(out, keep_last=2).latest == 4


def test_any_error_of_the_host_saves_the_last_step(tiny_run, finished, tmp_path, monkeypatch):
    """A disk that is full for metrics.jsonl, say: nothing trained is lost, and it goes on."""
    out = tmp_path / "out"
    write = Records.write

    def full(self, *lines):
        if lines and lines[0]["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *lines)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "write", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(tiny_run(out))
    assert Checkpoints(out, keep_last=2).latest == 5  # the step after it was under way
    run(tiny_run(out))
    jax.tree.map(np.testing.assert_array_equal, params(out, 8), params(finished, 8))


def test_an_error_between_batch_and_step_loses_no_batch(tiny_run, finished, tmp_path, monkeypatch):
    """The batch was drawn and not used: the checkpoint has the position before it."""
    out, put_batch, calls = tmp_path / "out", train_loop.put_batch, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("no memory for the batch")
        return put_batch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train_loop, "put_batch", fail)
        with pytest.raises(RuntimeError, match="no memory for the batch"):
            run(tiny_run(out))
    assert Checkpoints(out, keep_last=2).latest == 4
    run(tiny_run(out))
    same_end(out, finished)


def test_an_update_that_is_not_finite_leaves_the_weights(tiny_run, tmp_path, monkeypatch, caplog):
    """An update can be NaN although the gradient is finite: the run names the step and goes on."""
    optimizer = build.optimizer

    def broken(*args, **kwargs):
        at_two = optax.scale_by_schedule(lambda n: jnp.where(n == 2, jnp.nan, 1.0))
        return optax.chain(optimizer(*args, **kwargs), at_two)

    monkeypatch.setattr(build, "optimizer", broken)
    out = tmp_path / "out"
    config = dataclasses.replace(tiny_run(out), save_every=2)
    caplog.set_level("INFO", "train")
    run(config)
    assert "step 3 partly skipped: loss" in caplog.text
    assert Checkpoints(out, keep_last=2).latest == config.steps
    last = params(out, config.steps)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last))
