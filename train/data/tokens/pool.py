"""Processes that tokenise parts, in order and never more at once than there are processes."""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from models.tokenizer import Tokenizer
from train.data.files.shard import Part
from train.data.tokens.encode import encode_part

# The packages' own __init__ would import all of them, and jax: 1.5 s and 200 MB for each process.
_WORKER = """
import importlib.util, sys
for name in ("models", "train", "train.data"):
    sys.modules[name] = importlib.util.module_from_spec(importlib.util.find_spec(name))
from train.data.tokens.worker import main
main()
"""

Job = tuple[Part, Path | None]
"""A part, and where its documents go; None: they are there."""


def write_parts(jobs: Iterable[Job], tokenizer: Tokenizer, *, workers: int) -> Iterator[Part]:
    """Tokenises parts and writes their documents; yields each part when it is done, in order.

    A single part, and every part for one worker, is tokenised in this process: starting another
    takes seconds.

    Args:
        jobs: parts and their files.
        tokenizer: goes to every process.
        workers: processes.

    Raises:
        OSError: a file cannot be written, or a process ended (out of memory).
    """
    jobs = iter(jobs)
    waiting: list[Job] = []
    for job in jobs:
        waiting.append(job)
        if workers > 1 and sum(path is not None for _, path in waiting) > 1:
            break
        if workers == 1:
            yield _here(waiting.pop(), tokenizer)
    else:
        yield from (_here(job, tokenizer) for job in waiting)
        return
    with _Pool(tokenizer, workers) as pool:
        running: deque[tuple[Part, Future[None] | None]] = deque()
        for part, path in (job for some in (waiting, jobs) for job in some):
            running.append((part, None if path is None else pool.submit(part, path)))
            # Twice as many as work on them: nobody waits while the oldest is the slowest.
            while sum(future is not None for _, future in running) >= 2 * workers:
                yield _done(*running.popleft())
        while running:
            yield _done(*running.popleft())


def _here(job: Job, tokenizer: Tokenizer) -> Part:
    part, path = job
    if path is not None:
        encode_part(part, tokenizer).write(path)
    return part


def _done(part: Part, future: Future[None] | None) -> Part:
    if future is not None:
        future.result()
    return part


class _Pool:
    """A thread for each process: it hands over a part and waits for the answer."""

    def __init__(self, tokenizer: Tokenizer, workers: int):
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._tokenizer: bytes = pickle.dumps(tokenizer)

    def submit(self, part: Part, path: Path) -> Future[None]:
        return self._threads.submit(self._ask, part, path)

    def _ask(self, part: Part, path: Path) -> None:
        try:
            process = self._free.get_nowait()
        except queue.Empty:  # a thread has one process at a time, so there are never more
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((part, path), process.stdin)
            process.stdin.flush()
            error = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            error = OSError(
                f"a process that tokenises ended with status {process.wait()}: out of memory?"
            )
        finally:
            self._free.put(process)
        if error is not None:
            raise error

    def _start(self) -> subprocess.Popen[bytes]:
        root = Path(__file__).parents[3]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        # One core each; a GPU, if any, is not theirs.
        own = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | own,
            # Ctrl-C is this process's to handle: it ends them in an orderly way.
            process_group=0,
        )
        self._processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the first answer will not come
            process.stdin.write(self._tokenizer)
        return process

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:  # what they do is not wanted any more
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
            process.stdout.close()
            process.wait()
