"""metrics.jsonl holds a line per step of this run, also after a run that died."""

import io
import json
import time

import jax.numpy as jnp
import pytest

from train.metrics.flops import training_flops
from train.metrics.metrics import Metrics

VALUES = {
    "loss": jnp.float32(2.5),
    "tokens": jnp.float32(100.0),
    "loss_tokens": jnp.float32(80.0),
    "grad_norm": jnp.float32(1.0),
    "lr": jnp.float32(1e-3),
}


def open_metrics(path, tiny, **kwargs):
    options = {"start": 0, "steps": 6, "log_every": 1, "positions": 128} | kwargs
    return Metrics(path, model=tiny, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_what_was_measured(tmp_path, tiny, capsys):
    path = tmp_path / "metrics.jsonl"
    metrics = open_metrics(path, tiny)
    line = metrics.record(1, VALUES, pairs=50)
    metrics.close()
    assert lines(path) == [line]
    assert line["step"] == 1 and line["loss"] == 2.5
    assert line["tokens_per_second"] == pytest.approx(100 / line["seconds"])
    assert line["peak_memory_bytes"] > 10**7
    assert "mfu" not in line  # a CPU's peak is not known
    assert line["loss_tokens_per_second"] == pytest.approx(80 / line["seconds"])
    assert line["all_tokens_per_second"] == pytest.approx(128 / line["seconds"])
    shown = capsys.readouterr().err
    assert shown.startswith("step 1/6: loss 2.500, ") and "lr 1.00e-03, grad norm 1.00, " in shown
    assert "tokens/s" in shown and "GiB" in shown
    assert f"waited {line['data_seconds']:.3f} s for data" in shown


def test_losses_of_sources_are_means_by_name(tmp_path, tiny):
    """A source without tokens in the step is left out; sinks get one curve each; NaN is null."""
    path, sink = tmp_path / "metrics.jsonl", Written()
    metrics = open_metrics(path, tiny, sources=("a", "b", "c"), sinks=[sink])
    sums = {"source_losses": jnp.array([6.0, 0.0, jnp.nan]), "source_tokens": jnp.array([4, 0, 1])}
    metrics.record(1, VALUES | sums, pairs=50)
    metrics.close()
    a, c = {"loss": 1.5, "loss_tokens": 4.0}, {"loss": None, "loss_tokens": 1.0}
    assert lines(path)[0]["sources"] == {"a": a, "c": c}
    assert sink.values["train/loss/a"] == 1.5 and "train/loss/b" not in sink.values


class Written:
    """A sink that keeps the last values."""

    def write(self, step, values):
        self.values = values

    def close(self):
        pass


def test_time_is_split(tmp_path, tiny):
    """Waiting and computing add up to the step's time, and each line has its own parts."""
    metrics = open_metrics(tmp_path / "metrics.jsonl", tiny)
    for _ in range(2):
        with metrics.timed("data"):
            time.sleep(0.02)
    with metrics.timed("checkpoint"):
        time.sleep(0.01)
    first, second = metrics.record(1, VALUES, pairs=0), metrics.record(2, VALUES, pairs=0)
    metrics.close()
    assert first["data_seconds"] >= 0.04 and first["checkpoint_seconds"] >= 0.01
    parts = ("data", "checkpoint", "evaluation", "compute")
    assert sum(first[f"{p}_seconds"] for p in parts) == pytest.approx(first["seconds"])
    assert second["data_seconds"] == second["checkpoint_seconds"] == 0


def test_speeds_are_without_evaluation_and_checkpoints(tmp_path, tiny, monkeypatch):
    """A step with an evaluation has the tokens/s and the MFU of its neighbors."""
    monkeypatch.setattr("train.metrics.metrics.peak_flops", lambda _: 1e9)
    metrics = open_metrics(tmp_path / "metrics.jsonl", tiny)
    with metrics.timed("data"):
        time.sleep(0.02)
    for part in ("evaluation", "checkpoint"):
        with metrics.timed(part):
            time.sleep(0.1)
    line = metrics.record(1, VALUES, pairs=50)
    metrics.close()
    training = line["compute_seconds"] + line["data_seconds"]
    assert line["seconds"] > training + 0.2 and line["data_seconds"] > 0.02
    assert line["tokens_per_second"] == pytest.approx(100 / training)
    flops = training_flops(tiny, 100, 50)
    assert line["mfu"] == pytest.approx(flops / training / 8e9)


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_progress_line_fits_the_terminal(tmp_path, tiny, monkeypatch, columns):
    """Values that do not fit are left out; loss and bar are always there."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    metrics = open_metrics(tmp_path / "metrics.jsonl", tiny, steps=100_000)
    for step in (99_998, 99_999):
        metrics.record(step, VALUES, pairs=0)
    metrics.close()
    shown = [part for part in screen.getvalue().split("\r") if "loss" in part]
    assert shown and all(len(part.rstrip("\n")) <= columns for part in shown)
    assert "/100000 [" in shown[-1] and "loss 2.500" in shown[-1]
    assert ("GiB" in shown[-1]) == (columns == 200)


def test_skipped_steps_are_shown(tmp_path, tiny, capsys):
    metrics = open_metrics(tmp_path / "metrics.jsonl", tiny)
    line = metrics.record(1, VALUES | {"skipped": jnp.float32(2)}, pairs=0)
    metrics.close()
    assert line["skipped"] == 2 and "skipped 2" in capsys.readouterr().err


def test_sinks_get_every_line(tmp_path, tiny):
    got = []

    class Sink:
        def write(self, step, values):
            got.append((step, values["train/loss"]))

        def close(self):
            got.append("closed")

    metrics = open_metrics(tmp_path / "metrics.jsonl", tiny, sinks=[Sink()], log_every=2, steps=3)
    for step in (1, 2, 3):
        metrics.record(step, VALUES, pairs=0)
    metrics.close()
    assert got == [(2, 2.5), (3, 2.5), "closed"]


def test_mfu_is_useful_flops_over_peak(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("train.metrics.metrics.peak_flops", lambda _: 1e9)
    metrics = open_metrics(tmp_path / "metrics.jsonl", tiny)
    line = metrics.record(1, VALUES, pairs=50)
    metrics.close()
    matrices = tiny.num_params() - tiny.vocab_size * tiny.hidden_size
    flops = 6 * matrices * 100 + 12 * 2 * 32 * 50
    assert line["mfu"] == pytest.approx(flops / line["seconds"] / 8e9)  # 8 devices


def test_resume_drops_what_the_checkpoint_has_not_seen(tmp_path, tiny):
    """Steps after the checkpoint run again; a line cut off by a kill goes too."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    metrics = open_metrics(path, tiny, start=2)
    metrics.record(3, VALUES, pairs=0)
    metrics.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert lines(path)[2]["loss"] == 2.5


def test_log_every_keeps_the_last(tmp_path, tiny):
    path = tmp_path / "metrics.jsonl"
    metrics = open_metrics(path, tiny, steps=5, log_every=2)
    for step in range(1, 6):
        metrics.record(step, VALUES, pairs=0)
    metrics.close()
    assert [line["step"] for line in lines(path)] == [2, 4, 5]
