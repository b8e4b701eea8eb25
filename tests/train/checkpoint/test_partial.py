"""Partial checkpoints are removed, also while threads of a failed save still write."""

import contextlib
import threading
import time
from collections.abc import Iterator

from train.checkpoint import partial
from train.checkpoint.partial import remove_partial


def names(directory):
    return sorted(p.name for p in directory.iterdir())


@contextlib.contextmanager
def writing(partial_dir, stop: threading.Event) -> Iterator[threading.Thread]:
    """Run a thread that writes as tensorstore does: it creates the directories that are missing."""

    def write():
        n = 0
        while not stop.is_set():
            file = partial_dir / "state" / f"d{n % 7}" / str(n)
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
        while not partial_dir.exists():
            time.sleep(0.001)
        yield thread
    finally:
        stop.set()
        thread.join()


def test_partial_checkpoints_go_and_steps_stay(tmp_path):
    (tmp_path / "3" / "state").mkdir(parents=True)
    (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (tmp_path / "5.orbax-checkpoint-tmp-17").mkdir()
    remove_partial(tmp_path)
    assert names(tmp_path) == ["3"]


def test_a_directory_that_is_not_there_stays_so(tmp_path):
    remove_partial(tmp_path / "checkpoints", quiet_seconds=0.05)
    assert names(tmp_path) == []


def test_waits_for_writers_that_go_on_after_the_error(tmp_path):
    stop = threading.Event()
    with writing(tmp_path / "4.orbax-checkpoint-tmp", stop):
        threading.Timer(0.3, stop.set).start()
        remove_partial(tmp_path, quiet_seconds=1.5)  # more than a busy machine lets a thread wait
    assert names(tmp_path) == []


def test_a_writer_without_an_end_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "TIMEOUT", 0.3)
    with writing(tmp_path / "4.orbax-checkpoint-tmp", threading.Event()) as thread:
        remove_partial(tmp_path, quiet_seconds=60.0)
        assert thread.is_alive()
