"""Set up the log of a run: one handler on standard output, in the first process only."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import jax
from tqdm import tqdm

from models.terminal import escape_control, set_up_streams

LOGGERS = ("jaxattn", "models", "train")
"""Top-level loggers of the project; every module logs with `logging.getLogger(__name__)`."""


class ConsoleHandler(logging.Handler):
    """Write log lines to standard output, above the progress bar, from the first process only.

    Lines of level INFO are written without a prefix, all others after the name of their level.
    Libraries are shown from WARNING on.
    Control characters, which texts of a model or of a data file may hold, are escaped.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. Standard output is looked up at each call, so it can be redirected."""
        ours = record.name.partition(".")[0] in LOGGERS
        if not ours and record.levelno < logging.WARNING or jax.process_index() != 0:
            return
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(escape_control(f"{level}{record.getMessage()}"))
        sys.stdout.flush()


_HANDLER = ConsoleHandler()


def set_up_logging(level: str = "info") -> None:
    """Attach the handler to the root logger, and set the level, a name in lower case. Idempotent.

    The handler is at the root and replaces the one that absl installs when orbax is imported, so
    that no line is written twice.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.addHandler(_HANDLER)  # a second call adds nothing
    for name in LOGGERS:
        logging.getLogger(name).setLevel(level.upper())


class SafeStream:
    """Wrap a console stream so that a write never raises; text that cannot be written is dropped.

    Training must not end because its console is closed or its disk is full.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with self._dropping():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader has gone: later writes, at exit too, go nowhere
            with open(os.devnull, "w") as nowhere, contextlib.suppress(OSError):
                os.dup2(nowhere.fileno(), self._stream.fileno())
        except (OSError, ValueError):
            pass


@contextlib.contextmanager
def safe_console() -> Iterator[None]:
    """Replace standard output and standard error by `SafeStream`s inside the block."""
    set_up_streams()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(SafeStream, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
