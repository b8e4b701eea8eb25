"""metrics.jsonl holds a line per step of this run, also after a run that died."""

import json

import jax.numpy as jnp
import pytest

from train.metrics import Metrics

VALUES = {"loss": jnp.float32(2.5), "tokens": jnp.float32(100.0), "grad_norm": jnp.float32(1.0)}


def open_metrics(path, tiny, **kwargs):
    options = {"start": 0, "steps": 6, "log_every": 1} | kwargs
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
    shown = capsys.readouterr().err
    assert "loss 2.500" in shown and "tokens/s" in shown and "GiB" in shown


def test_mfu_is_useful_flops_over_peak(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("train.metrics.peak_flops", lambda _: 1e9)
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
