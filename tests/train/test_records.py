"""What a run wrote down is read as whole lines, and kept up to the step it goes on from."""

from pathlib import Path

from train.records import text_until, whole_lines


def test_a_line_that_a_kill_cut_off_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert whole_lines(path) == ['{"step": 1}\n', '{"step": 2}\n']


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert whole_lines(tmp_path / "no.jsonl") == []
    assert text_until(tmp_path / "no.jsonl", 5) == ""


def test_what_later_steps_wrote_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "again": true}\n{"step": 3}\n{"step": 4')
    assert text_until(path, 2) == '{"step": 1}\n{"step": 2}\n{"step": 2, "again": true}\n'
