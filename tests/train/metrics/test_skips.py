"""Skipped steps: named once each, and too many in a row end the run."""

import json

import pytest

from train.data.loader import Loader
from train.metrics.skips import NAMED, Skips


class Documents(Loader):
    """The part of a loader that `Skips` uses."""

    def __init__(self, count: int):
        self.count = count

    def documents(self, state):
        return [f"data.json:{state['row'] + i}" for i in range(self.count)]


def line(step: int, in_a_row: int, not_finite=0.0) -> dict:
    values = {"step": step, "in_a_row": float(in_a_row), "loss": float("nan"), "grad_norm": 3.0}
    return values | {"not_finite": not_finite}


def test_weights_that_kept_their_values_are_counted(tmp_path, caplog):
    caplog.set_level("INFO", "train")
    skips = Skips(tmp_path / "skipped.jsonl", Documents(1), patience=3, start=0)
    skips.look(line(2, 1, 1234.0), {"row": 10})
    wanted = "step 2 partly skipped: loss nan, gradient norm 3, update not finite for 1,234 weights"
    assert wanted in caplog.text


def test_a_skip_is_logged_and_recorded_with_all_documents(tmp_path, caplog):
    caplog.set_level("INFO", "train")
    skips = Skips(tmp_path / "skipped.jsonl", Documents(NAMED + 2), patience=3, start=0)
    skips.look(line(1, 0), {"row": 5})
    assert not (tmp_path / "skipped.jsonl").exists()
    skips.look(line(2, 1), {"row": 10})
    [written] = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert written["step"] == 2 and len(written["documents"]) == NAMED + 2
    output = caplog.text
    assert "step 2 skipped: loss nan, gradient norm 3; documents data.json:10, " in output
    assert "and 2 more" in output and "data.json:16" not in output


def test_patience_ends_the_run_with_the_reason(tmp_path):
    skips = Skips(tmp_path / "skipped.jsonl", Documents(1), patience=2, start=0)
    skips.look(line(7, 1), {"row": 0})
    with pytest.raises(FloatingPointError, match="2 steps in a row were skipped.*step 8") as error:
        skips.look(line(8, 2), {"row": 1})
    assert "data.json:1" in str(error.value) and "\n" not in str(error.value)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    """Lines after the checkpoint, and one that was cut in the middle."""
    path = tmp_path / "skipped.jsonl"
    path.write_text('{"step": 3}\n{"step": 9}\n{"step"')
    Skips(path, Documents(1), patience=2, start=5)
    assert path.read_text() == '{"step": 3}\n'
