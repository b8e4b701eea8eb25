"""One thread in the background that nobody ever has to wait for."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Thread:
    """Runs what it is given, one after the other.

    A daemon, unlike the threads of concurrent.futures: where a file system hangs, the program can
    still end.
    """

    def __init__(self, name: str):
        self._work: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit[R](self, call: Callable[..., R], *args: Any) -> "Future[R]":
        """Begins call(*args) when what came before it is done; the first call starts the thread."""
        if self._thread.ident is None:
            self._thread.start()
        future: Future[R] = Future()
        self._work.put((future, call, args))
        return future

    def end(self, timeout: float = 1.0) -> None:
        """Ends the thread after its work; does not wait longer than `timeout` seconds for it."""
        if self._thread.ident is not None:
            self._work.put(None)
            self._thread.join(timeout)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            future, call, args = work
            if not future.set_running_or_notify_cancel():
                continue
            result: Any = None
            try:
                result = call(*args)
            except BaseException as error:  # raised again by Future.result
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, call, args, work, result  # keep no batch alive while waiting for the next
