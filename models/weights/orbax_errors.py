"""Turn the failures of orbax and tensorstore into one line."""

import contextlib
import functools
import gc
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

_SYSTEM_ERRORS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "Permission denied",
    "Read-only file system",
    "Too many open files",
    "Cannot allocate memory",
    "RESOURCE_EXHAUSTED",
    "can't start new thread",
)
_NOT_DAMAGE = _SYSTEM_ERRORS[3:]
# Raised in threads and coroutines of a save or restore that was already given up.
_AFTER_FAILURE = ("Event loop is closed", "Encountered error while reading array index")


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drop orbax's tracebacks while the block runs; orbax raises each failure as well.

    Records of other libraries in the same loggers pass. Logging and warnings are as before when
    the block ends.
    """
    _drop_late_results()
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
        for logger in loggers:
            logger.addFilter(_not_from_orbax)
        try:
            yield
        finally:
            gc.collect()  # abandoned coroutines warn when they are collected
            for logger in loggers:
                logger.removeFilter(_not_from_orbax)


@functools.cache
def _drop_late_results() -> None:
    """Drop the tracebacks of tensorstore's threads, until the process ends.

    Orbax closes its event loop when the first array of a restore fails. Threads that read other
    arrays then fail to deliver their results, at any time later.
    """
    hook = sys.unraisablehook

    def quiet_hook(unraisable) -> None:
        if not any(text in str(unraisable.exc_value) for text in _AFTER_FAILURE):
            hook(unraisable)

    sys.unraisablehook = quiet_hook


def cause(error: Exception) -> str:
    """Return the operating system's reason if the error contains one, else its first line."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):
        return text
    return next((reason for reason in _SYSTEM_ERRORS if reason in str(error)), text[:300])


def is_damage(error: Exception) -> bool:
    """Tell damaged files from a machine that cannot read them now (permission, memory)."""
    return not isinstance(error, (PermissionError, MemoryError)) and not any(
        reason in str(error) for reason in _NOT_DAMAGE
    )


def unreadable(directory: Path) -> Path | None:
    """Return a file or directory without read permission: orbax may report other errors then."""
    for path in itertools.chain([directory], directory.rglob("*")):
        if os.path.exists(path) and not os.access(
            path, os.R_OK | (os.X_OK if path.is_dir() else 0)
        ):
            return path
    return None


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # asyncio's own records name the file of the coroutine in their text
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()
