"""Rows of the bench are what they are called, and padding is not counted as work."""

import dataclasses
import json

import numpy as np
import pytest

from models.config import PRESETS
from tests.train.cells import CELL
from train.bench import shapes as bench_shapes
from train.bench.shapes import LONG_STEP, STEPS, batches, outcome, random_rows, time_steps
from train.data.pack.packing import Batch
from train.metrics.flops import causal_pairs, training_flops


def test_rows_of_a_step_are_a_multiple_of_the_microbatches():
    sizes = [dataclasses.replace(CELL, tokens=t, grad_accum=2).batch_size for t in (32, 96, 128)]
    assert sizes == [2, 2, 4]


def test_packed_rows_are_documents():
    rows = random_rows(2, 32768, 320, packed=True)
    lengths = np.bincount(rows.segment_ids[0])[1:]
    assert len(lengths) == 20 and lengths.sum() == 32768  # as jaxattn.bench's 7b_32k_packed
    assert lengths.max() == 5526 and lengths[:-1].min() >= 16
    starts = np.flatnonzero(rows.positions[0] == 0)
    assert len(starts) == len(lengths) and (rows.positions[0] < 16384).all()
    assert causal_pairs(rows.segment_ids) < 2 * 32768 * 32769 // 2 / 4


def test_dense_rows_are_one_document():
    rows = random_rows(3, 16, 320, packed=False)
    assert (rows.segment_ids == 1).all() and (rows.positions == np.arange(16)).all()
    np.testing.assert_array_equal(rows.targets[:, :-1], rows.tokens[:, 1:])
    [batch] = batches(CELL, 2)
    assert batch.segment_ids is None  # what cudnn takes


def test_files_are_packed_as_for_training(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps({"text": "abc" * n}) + "\n" for n in range(1, 9)))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    cell = dataclasses.replace(CELL, rows="data", data=(str(file), str(copy)))
    made = batches(cell, 2)
    assert made[0].sources is None  # the compiled step has no losses by file
    assert len(made) == STEPS and made[0].tokens.shape == (2, 32)
    assert any(len(np.unique(batch.segment_ids)) > 2 for batch in made)
    with pytest.raises(ValueError, match="no such data file"):
        batches(dataclasses.replace(cell, data=("none.txt",)), 2)


def test_a_tokenizer_too_large(tmp_path):
    small = dataclasses.replace(PRESETS["nano"], vocab_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "nano", small)
        with pytest.raises(ValueError, match="more than the 16 of nano"):
            batches(dataclasses.replace(CELL, rows="data", data=("x",)), 1)


def test_padding_is_no_work():
    """6 of 8 places in documents of 4 and 2: their tokens, their pairs."""
    ids = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32)
    zeros = np.zeros_like(ids)
    work = [Batch(zeros, zeros, zeros.astype(np.float32), ids, zeros)]
    cell = dataclasses.replace(CELL, seq_len=4)
    found = outcome(cell, work, seconds=2.0, device="NVIDIA H200", devices=2)
    assert (found["batch_size"], found["ms"], found["filled"]) == (2, 2000.0, 0.75)
    assert found["tokens_per_second"] == 3
    flops = training_flops(PRESETS["nano"], 6, 10 + 3)
    assert found["mfu"] == pytest.approx(flops / 2.0 / (2 * 989e12))
    assert "mfu" not in outcome(cell, work, seconds=2.0, device="cpu", devices=1)


class Device:
    """A device with its own clock, on which each step takes a given time."""

    def __init__(self, monkeypatch, seconds):
        """`seconds` of the first steps; the last of them is that of all others."""
        self.now, self.steps, self.waits = 0.0, [], []
        self._seconds = seconds
        monkeypatch.setattr(bench_shapes.time, "perf_counter", lambda: self.now)

    def step(self, i):
        """Launch a step."""
        self.now += self._seconds[min(len(self.steps), len(self._seconds) - 1)]
        self.steps.append(i)

    def wait(self, _):
        """Remembers after how many steps."""
        self.waits.append(len(self.steps))


def test_every_batch_is_stepped_on(monkeypatch):
    """Short steps are timed three by three; the first, and the one after it, by themselves."""
    device = Device(monkeypatch, [9.0, 1.9])
    first, seconds = time_steps(device.step, device.wait, 2)
    assert (first, seconds) == (9.0, pytest.approx(1.9))
    assert device.steps == list(range(11)) and device.waits == [1, 2, 5, 8, 11]


def test_long_steps_are_runs_by_themselves(monkeypatch):
    """No more of them than the first and one for each repeat; their median counts."""
    device = Device(monkeypatch, [50.0, 12.0, 13.0, 20.0])
    assert time_steps(device.step, device.wait, 3) == (50.0, 13.0)
    assert device.steps == [0, 1, 2, 3] and device.waits == [1, 2, 3, 4]
    device = Device(monkeypatch, [50.0, LONG_STEP])
    assert time_steps(device.step, device.wait, 1) == (50.0, LONG_STEP)
    assert device.steps == [0, 1]
