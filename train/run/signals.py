"""Turn termination signals into a stop request that the train loop reads between steps."""

import contextlib
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C; the end of a job; a closed terminal; warnings of SLURM's --signal."""


class StopRequest:
    """Name of the first signal that was received, or None."""

    name: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record the first signal inside the block; a second one of the same kind acts as usual.

    A signal that is ignored on entry, as SIGHUP under nohup, stays ignored.

    Yields:
        The request, for the train loop.
    """
    stop = StopRequest()
    usual = {s: signal.getsignal(s) for s in SIGNALS}
    usual = {s: handler for s, handler in usual.items() if handler != signal.SIG_IGN}

    def record(number, _frame):
        stop.name = signal.Signals(number).name
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, record)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
