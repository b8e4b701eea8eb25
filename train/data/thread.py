"""A background thread that never keeps the program from ending."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Thread:
    """Run calls one after the other.

    A daemon, unlike the threads of concurrent.futures: the program can end while a file system
    hangs.
    """

    def __init__(self, name: str):
        self._work: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit[R](self, call: Callable[..., R], *args: Any) -> "Future[R]":
        """Queue call(*args) behind earlier calls; the first one starts the thread."""
        if self._thread.ident is None:
            self._thread.start()
        future: Future[R] = Future()
        self._work.put((future, call, args))
        return future

    def end(self, timeout: float = 1.0) -> None:
        """End the thread after its work; wait for at most `timeout` seconds."""
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
