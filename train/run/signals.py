"""SIGINT and SIGTERM as a wish that the loop grants between two steps."""

import contextlib
import signal
from collections.abc import Iterator


class Stop:
    """Whether someone asked the run to stop, and how."""

    name: str | None = None
    """"SIGINT" or "SIGTERM", or None."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within it a first signal is noted; a second one of the same kind acts as usual.

    Yields:
        The wish, for the loop to look at.
    """
    stop = Stop()
    usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number, _frame):
        stop.name = signal.Signals(number).name
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
