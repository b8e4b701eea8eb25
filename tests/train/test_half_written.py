"""What is half written goes, also while threads of the failed save still write; steps stay."""

import threading
import time

from train import half_written
from train.half_written import remove_half_written


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def writer(half, seconds):
    """A thread that writes as tensorstore does: it makes the directories that it misses."""

    def write():
        end = time.monotonic() + seconds
        n = 0
        while time.monotonic() < end:
            file = half / "state" / f"d{n % 7}" / str(n)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"x")
            except OSError:
                pass  # its directory went meanwhile
            n += 1
            time.sleep(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_the_half_written_goes_and_steps_stay(tmp_path):
    (tmp_path / "3" / "state").mkdir(parents=True)
    (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "5.orbax-checkpoint-tmp-17").mkdir()
    remove_half_written(tmp_path)
    assert names(tmp_path) == ["3"]


def test_a_directory_that_is_not_there_stays_so(tmp_path):
    remove_half_written(tmp_path / "checkpoints", quiet=0.05)
    assert names(tmp_path) == []


def test_waits_for_writers_that_go_on_after_the_error(tmp_path):
    half = tmp_path / "4.orbax-checkpoint-tmp"
    thread = writer(half, 0.4)
    while not half.exists():
        time.sleep(0.001)
    remove_half_written(tmp_path, quiet=0.3)
    thread.join()
    assert names(tmp_path) == []


def test_a_writer_without_an_end_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(half_written, "LONGEST", 0.3)
    thread = writer(tmp_path / "4.orbax-checkpoint-tmp", 1.5)
    begin = time.monotonic()
    remove_half_written(tmp_path, quiet=0.2)
    assert time.monotonic() - begin < 1.2
    thread.join()
