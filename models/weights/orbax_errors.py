"""Failures of orbax and tensorstore as one line."""

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator

_SYSTEM_ERRORS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "Permission denied",
    "Read-only file system",
    "Too many open files",
)
# Raised in threads and coroutines of a save or restore that was already given up.
_AFTER_FAILURE = ("Event loop is closed", "Encountered error while reading array index")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drop the tracebacks that orbax logs while the block runs; orbax also raises each failure."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    hook = sys.unraisablehook

    def quiet_hook(unraisable) -> None:
        if not any(text in str(unraisable.exc_value) for text in _AFTER_FAILURE):
            hook(unraisable)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
        for logger in loggers:
            logger.addFilter(_not_from_orbax)
        sys.unraisablehook = quiet_hook
        try:
            yield
        finally:
            gc.collect()  # coroutines that were given up warn when they are collected
            sys.unraisablehook = hook
            for logger in loggers:
                logger.removeFilter(_not_from_orbax)


def cause(error: Exception) -> str:
    """Return the operating system's reason if the error contains one, else its first line."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):
        return text
    return next((reason for reason in _SYSTEM_ERRORS if reason in str(error)), text[:300])


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # asyncio's own records name the file of the coroutine in their text
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()
