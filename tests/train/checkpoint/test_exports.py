"""Exports are complete or absent, the newest stay, and a failure is one line."""

import errno
import threading

import pytest

from train.checkpoint.exports import Exports


def names(out):
    return sorted(path.name for path in (out / "export").iterdir())


def writer(text):
    return lambda: lambda directory: (directory / "weights").write_text(text) and None


def test_newest_exports_stay_and_partial_ones_are_removed(tmp_path):
    """Those of steps that run again after a kill are removed; training goes on meanwhile."""
    for killed in (".step-13.partial", ".step-1.removed", "step-12", "step-3"):
        (tmp_path / "export" / killed).mkdir(parents=True)
    go_on = threading.Event()

    def slow(directory):
        assert go_on.wait(60)
        (directory / "weights").write_text("old")

    with Exports(tmp_path, keep=2) as exports:
        exports.begin(3)
        assert names(tmp_path) == ["step-3"]
        exports.save(4, lambda: slow)
        assert "step-4" not in names(tmp_path)  # `save` has not waited
        go_on.set()
        for step in (9, 10):
            exports.save(step, writer(str(step)))
    assert names(tmp_path) == ["step-10", "step-9"]
    assert (tmp_path / "export" / "step-10" / "weights").read_text() == "10"


def test_failure_is_raised_by_the_next_export_and_leaves_no_directory(tmp_path):
    def full(directory):
        (directory / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"cannot write the export .*step-2: .*No space left on device$"
    with Exports(tmp_path, keep=2) as exports:
        exports.save(1, writer("1"))
        exports.save(2, lambda: full)
        with pytest.raises(OSError, match=message):
            exports.save(3, writer("3"))
        assert names(tmp_path) == ["step-1"]
    with pytest.raises(OSError, match=message), Exports(tmp_path, keep=2) as exports:
        exports.save(2, lambda: full)
    assert names(tmp_path) == ["step-1"]
