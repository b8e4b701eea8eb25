"""Failures of orbax become one line, and its tracebacks are dropped in a block only."""

import logging
import sys
import warnings
from types import SimpleNamespace

import pytest

from models.weights.orbax_errors import _drop_late_results, cause, is_damage, quiet_orbax


@pytest.mark.parametrize(
    ("error", "line", "damage"),
    [
        (ValueError("a\nNo space left on device\nb"), "No space left on device", True),
        (ValueError("PERMISSION_DENIED: open: Permission denied [d]"), "Permission denied", False),
        (PermissionError(13, "Permission denied", "f"), "[Errno 13] Permission denied: 'f'", False),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), "RESOURCE_EXHAUSTED", False),
        (OSError(24, "Too many open files"), "[Errno 24] Too many open files", False),
        (ValueError("first\nsecond"), "first", True),
        (KeyError(), "KeyError", True),
        (FileNotFoundError(2, "No such file", "f"), "[Errno 2] No such file: 'f'", True),
    ],
)
def test_one_line_and_whether_the_files_are_damaged(error, line, damage):
    assert cause(error) == line
    assert is_damage(error) == damage


def _record(pathname: str, message: str) -> logging.LogRecord:
    return logging.LogRecord("absl", logging.ERROR, pathname, 1, message, None, None)


def test_only_orbax_is_quiet_and_only_inside(capfd):
    """Records of others pass; logger and warning filters are as before afterwards."""
    before = warnings.filters[:]
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger("absl")
    logger.addHandler(handler)
    try:
        with quiet_orbax():
            logger.handle(_record("/site-packages/orbax/checkpoint/future.py", "dropped"))
            logger.handle(_record("asyncio/base_events.py", "Task <coro at .../orbax/x.py>"))
            logger.handle(_record("/site-packages/other.py", "passes"))
        logger.handle(_record("/site-packages/orbax/checkpoint/future.py", "after"))
    finally:
        logger.removeHandler(handler)
    assert seen == ["passes", "after"]
    assert warnings.filters[:] == before


def test_results_that_arrive_after_a_failed_restore_print_nothing(monkeypatch):
    """A thread of tensorstore may post to orbax's closed event loop after the block has ended."""
    shown: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: shown.append(str(u.exc_value)))
    _drop_late_results.cache_clear()
    try:
        with quiet_orbax():
            pass
        for text in ("Event loop is closed", "another fault"):
            sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))  # type: ignore[arg-type]
    finally:
        _drop_late_results.cache_clear()
    assert shown == ["another fault"]
