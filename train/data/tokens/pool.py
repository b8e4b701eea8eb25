"""Worker processes that tokenize chunks, in order."""

import itertools
import multiprocessing
import pickle
import signal
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from train.data.files.readers import Chunk
from train.data.tokens import worker
from train.data.tokens.documents import Documents

Encode = Callable[[Chunk], Documents]

Job = tuple[Chunk, Path | None]
"""A chunk, and the file for its documents; None if that file exists."""


def write_documents(jobs: Iterable[Job], encode: Encode, *, workers: int) -> Iterator[Chunk]:
    """Tokenize chunks and write their documents; yield each chunk when it is done, in order.

    A single chunk, and every chunk for one worker, is tokenized in this process: starting another
    one takes seconds.

    Raises:
        OSError: a file cannot be written, or a process died (out of memory).
        ValueError: a chunk cannot be tokenized.
    """
    jobs = iter(jobs)
    waiting: list[Job] = []
    for job in jobs:
        waiting.append(job)
        if workers > 1 and sum(path is not None for _, path in waiting) > 1:
            break
        if workers == 1:
            yield _done(*waiting.pop(), encode)
    else:
        yield from (_done(*job, encode) for job in waiting)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, worker.start, (pickle.dumps(encode),)) as pool:
        running: deque[tuple[Chunk, Future[None]]] = deque()
        try:
            for chunk, path in itertools.chain(waiting, jobs):
                running.append((chunk, _submit(pool, chunk, path)))
                # Twice as many as work on them: nobody waits while the oldest is the slowest.
                if len(running) >= 2 * workers:
                    yield _result(*running.popleft())
            while running:
                yield _result(*running.popleft())
        except (BrokenProcessPool, BrokenPipeError) as error:
            raise OSError("a process that tokenizes died: out of memory?") from error
        finally:
            for _, future in running:
                future.cancel()


def _done(chunk: Chunk, path: Path | None, encode: Encode) -> Chunk:
    if path is not None:
        encode(chunk).write(path)
    return chunk


def _result(chunk: Chunk, future: Future[None]) -> Chunk:
    future.result()
    return chunk


def _submit(pool: ProcessPoolExecutor, chunk: Chunk, path: Path | None) -> Future[None]:
    """Submit a chunk, unless its file exists; the executor may start a process for it.

    A new process would import the program's main module, and jax with it (1.5 s, 200 MB), so there
    is none to import. It ignores Ctrl-C, which is this process's to handle.
    """
    if path is None:
        done: Future[None] = Future()
        done.set_result(None)
        return done
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(worker.write, chunk, path)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        sys.modules["__main__"] = main
