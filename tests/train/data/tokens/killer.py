"""Kills processes that build a cache or load batches, at random moments; run by test_kill.py.

A program of its own with no thread: it forks what it kills, which costs milliseconds where starting
Python costs seconds. Prints JSON.
"""

import contextlib
import hashlib
import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from models.tokenizer import load_tokenizer
from train.data.loader import Loader
from train.data.open import open_data
from train.data.tokens.cache import ReadOptions

CHUNK, ROWS, BATCHES = 512, dict(seq_len=64, batch_size=3, seed=5), 150
KILLS = 20
PATIENCE = 10.0  # seconds
PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT  # whether it has ended, which `ended` asks again


def forked(child: Callable[[], None], log: Path) -> int:
    """Start a process that does this and nothing else."""
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(Exception):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            child()
            sys.stdout.flush()
            status = 0
        os._exit(status)
    return pid


def ended(pid: int) -> int:
    """Return the exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(
    child: Callable[[], None], log: Path, seconds: float, begun: Callable[[], bool] | None = None
) -> bool:
    """Return True if SIGKILL after this delay came before the end.

    What does not begin in `PATIENCE` is killed all the same.
    """
    pid, latest = forked(child, log), time.monotonic() + PATIENCE
    while begun is not None and not begun() and os.waitid(os.P_PID, pid, PEEK) is None:
        if time.monotonic() > latest:
            break
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


def load(path: Path, directory: Path | None, log: Path, *, workers: int = 1) -> None:
    """Write the hash of every batch after its position, from the end of `log` on."""
    with opened(path, directory, workers) as loader:
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        if whole:
            loader.restore(json.loads(whole[-1])[1])
        with log.open("w") as file:
            file.writelines(whole)
            for number in range(len(whole), BATCHES):
                batch = next(loader)
                digest = hashlib.blake2b(
                    b"".join(x.tobytes() for x in batch if x is not None)
                ).hexdigest()
                file.write(json.dumps([digest, loader.state(), number]) + "\n")
                file.flush()


def digests(log: Path) -> list[str]:
    return [json.loads(line)[0] for line in log.read_text().splitlines()]


def while_building(path: Path, root: Path, workers: int, kills: int) -> dict:
    """Kills builds of new caches, three in four after their first part; lets others finish."""
    chance = random.Random(workers)
    said, whole = root / "said", root / "whole"
    pid = forked(lambda: build(path, whole, workers), said)
    while next(whole.rglob("*.tokens"), None) is None:  # without the start of the workers
        assert os.waitid(os.P_PID, pid, PEEK) is None
    start = time.perf_counter()
    assert ended(pid) == 0
    seconds = time.perf_counter() - start
    load(path, None, root / "expected")
    same, unfinished = [], []
    for number in range(kills):
        directory, log = root / f"cache{number}", root / f"log{number}"

        def parts(directory: Path = directory) -> bool:
            return next(directory.rglob("*.tokens"), None) is not None

        begun = None if number % 4 == 3 else parts
        moment = chance.uniform(0, seconds / 2)
        hit = killed(lambda at=directory: build(path, at, workers), said, moment, begun)
        made = len(list(directory.rglob("*.tokens")))
        unfinished.append(hit and made > 0 and not list(directory.rglob("whole.json")))
        pid = forked(lambda at=directory, log=log: load(path, at, log), said)
        same.append(ended(pid) == 0 and digests(log) == digests(root / "expected"))
    return {"same": same, "unfinished": unfinished}


def build(path: Path, directory: Path, workers: int) -> None:
    opened(path, directory, workers).close()


def opened(path: Path, directory: Path | None, workers: int) -> Loader:
    reading = ReadOptions(cache=directory, workers=workers, chunk=CHUNK)
    return open_data([path], load_tokenizer("byte"), reading=reading, **ROWS)


def while_loading(path: Path, root: Path) -> dict:
    """Kills one run again and again, one time in four before its first batch; lets it go on."""
    chance = random.Random(0)
    load(path, None, root / "expected")
    said, log = root / "said", root / "log"
    assert ended(forked(lambda: build(path, root / "cache", 1), said)) == 0

    def batches() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    reached = [0]
    for number in range(KILLS):
        more = None if number % 4 == 3 else lambda: batches() > reached[-1]
        killed(lambda: load(path, root / "cache", log), said, chance.uniform(0, 0.003), more)
        reached.append(batches())
    status = ended(forked(lambda: load(path, root / "cache", log), said))
    return {
        "status": status,
        "same": digests(log) == digests(root / "expected"),
        "reached": reached,
    }


def two_builders(path: Path, root: Path) -> dict:
    """Two processes that begin to build one cache at the same time."""
    load(path, None, root / "expected")
    logs = [root / "first", root / "second"]
    pids = [forked(lambda log=log: load(path, root / "cache", log), root / "said") for log in logs]
    statuses = [ended(pid) for pid in pids]
    same = [digests(log) == digests(root / "expected") for log in logs]
    whole = len(list((root / "cache").rglob("whole.json")))
    return {
        "statuses": statuses,
        "same": same,
        "whole": whole,
        "left": len(list((root / "cache").rglob("*.tmp"))),
        "said": (root / "said").read_text(),
    }


def main() -> None:
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
    # Its thread may hold a lock while we fork, and the child would wait for it.
    tqdm.monitor_interval = 0
    # tqdm's own lock is shared by forked processes: one that is killed with it never releases it.
    tqdm.set_lock(threading.RLock())
    what, path, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    match what:
        case "building":
            print(json.dumps(while_building(path, root, 1, KILLS)))
        case "building with workers":
            print(json.dumps(while_building(path, root, 2, KILLS // 4)))
        case "loading":
            print(json.dumps(while_loading(path, root)))
        case "two":
            print(json.dumps(two_builders(path, root)))


if __name__ == "__main__":
    main()
