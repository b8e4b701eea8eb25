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
run.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_is_refused_until_the_first_ends(tmp_path):
    with RunLock(tmp_path) as first:
        first.acquire()
        first.acquire()  # once is enough
        with (
            RunLock(tmp_path) as second,
            pytest.raises(ValueError, match="another run is training in .* another --out$"),
        ):
            second.acquire()
    with RunLock(tmp_path) as third:
        third.acquire()


def test_a_killed_run_lets_go(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None and run.stdout.readline() == "held\n"
    with RunLock(tmp_path) as second:
        with pytest.raises(ValueError, match="another run is training"):
            second.acquire()
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        second.acquire()


def test_a_directory_that_is_not_there_is_not_made(tmp_path):
    with RunLock(tmp_path / "new") as run:
        run.acquire()
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "new").mkdir()
        run.acquire()
    assert [p.name for p in (tmp_path / "new").iterdir()] == [NAME]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path) as run:
        run.acquire()
    assert "cannot be locked ([Errno" in capsys.readouterr().out
