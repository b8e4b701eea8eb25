"""What is half written goes, also while threads of the failed save still write; steps stay."""

import contextlib
import threading
import time
from collections.abc import Iterator

from train.checkpoint import partial
from train.checkpoint.partial import remove_half_written


def names(directory):
    return sorted(p.name for p in directory.iterdir())


@contextlib.contextmanager
def writing(half, stop: threading.Event) -> Iterator[threading.Thread]:
    """A thread that writes as tensorstore does: it makes the directories that it misses."""

    def write():
        n = 0
        while not stop.is_set():
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
    try:
        while not half.exists():
            time.sleep(0.001)
        yield thread
    finally:
        stop.set()
        thread.join()


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
    stop = threading.Event()
    with writing(tmp_path / "4.orbax-checkpoint-tmp", stop):
        threading.Timer(0.3, stop.set).start()
        remove_half_written(tmp_path, quiet=1.5)  # more than a busy machine lets a thread wait
    assert names(tmp_path) == []


def test_a_writer_without_an_end_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "LONGEST", 0.3)
    with writing(tmp_path / "4.orbax-checkpoint-tmp", threading.Event()) as thread:
        remove_half_written(tmp_path, quiet=60.0)
        assert thread.is_alive()
