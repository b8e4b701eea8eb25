"""Records stay up to the step that a run resumes from, and a full disk loses none of them."""

import json
import resource
from pathlib import Path

import pytest

from train.metrics.records import Records, read_records


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def test_lines_are_there_when_write_returns(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl", start=0)
    records.write({"step": 1}, {"step": 2})
    records.write({"step": 3})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_makes_no_file_before_there_is_a_line_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    records = Records(path, start=0)
    assert not path.exists()
    assert read_records(path) == []
    records.write()
    assert path.read_bytes() == b""


def test_a_run_that_goes_on_drops_later_lines_and_the_one_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "again": true}\n{"step": 3}\n{"step": 2')
    records = Records(path, start=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "again": true}\n'
    records.write({"step": 3})
    assert steps(path) == [1, 2, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_any_text_comes_back(tmp_path: Path) -> None:
    """Also with what other systems take for the end of a line, and cut inside a character."""
    path = tmp_path / "samples.jsonl"
    text = "a\u2028b\x85c\x0bd\r\ne 你好"
    records = Records(path, start=0)
    records.write({"step": 1, "text": text})
    path.write_bytes(path.read_bytes() + '{"step": 2, "text": "你'.encode()[:-1])
    Records(path, start=5)
    assert read_records(path) == [{"step": 1, "text": text}]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """JSON has no NaN: other programs could not read the line."""
    path = tmp_path / "metrics.jsonl"
    Records(path, start=0).write(
        {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5, "set": "a"}
    )
    written = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5, "set": "a"}


@pytest.mark.parametrize(
    "line",
    [b"\0\0\0\0", b"\xff", b"[1]", b'{"epoch": 1}', b"", b"[" * 100_000, b'{"step": "1"}'],
    ids=["zeros", "no-utf8", "list", "no-step", "empty", "nested", "step-is-text"],
)
def test_a_line_that_is_damaged_or_of_something_else_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    message = r"metrics.jsonl:2 is no record of a run: .*; remove that line, or the file$"
    with pytest.raises(ValueError, match=message) as error:
        Records(path, start=3)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b'\n{"step": 3}\n'


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """A file-size limit simulates the full disk."""
    path = tmp_path / "metrics.jsonl"
    written = "".join(json.dumps({"step": n}) + "\n" for n in range(100))
    path.write_text(written)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) + 20, hard))
    try:
        records = Records(path, start=100)
        with pytest.raises(OSError, match="the same command goes on from the last") as error:
            records.write({"step": 100, "text": "x" * 50})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
        with pytest.raises(OSError, match="cannot write .*metrics.jsonl: File too large$"):
            Records(path, start=50)  # what it keeps is more than there is room for
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert steps(path) == list(range(100))
    assert list(tmp_path.iterdir()) == [path]
