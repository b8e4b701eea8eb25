"""A second run in a directory is refused; a killed one leaves nothing that keeps the next out."""

import errno
import fcntl
import signal
import subprocess
import sys

import pytest

from train.run.run_lock import NAME, RunLock

HOLD = """
import sys, time
from pathlib import Path
from train.run.run_lock import RunLock
run = RunLock(Path(sys.argv[1]))
run.claim()
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_is_refused_until_the_first_ends(tmp_path):
    with RunLock(tmp_path) as first:
        first.claim()
        first.claim()  # once is enough
        with (
            RunLock(tmp_path) as second,
            pytest.raises(ValueError, match="another run is training in .* another --out$"),
        ):
            second.claim()
    with RunLock(tmp_path) as third:
        third.claim()


def test_a_killed_run_lets_go(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None and run.stdout.readline() == "held\n"
    with RunLock(tmp_path) as second:
        with pytest.raises(ValueError, match="another run is training"):
            second.claim()
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        second.claim()


def test_a_directory_that_is_not_there_is_not_made(tmp_path):
    with RunLock(tmp_path / "new") as run:
        run.claim()
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "new").mkdir()
        run.claim()
    assert [p.name for p in (tmp_path / "new").iterdir()] == [NAME]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path) as run:
        run.claim()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out
