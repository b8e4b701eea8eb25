"""Atomic writes: a file gets its name when its last byte is written."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path`, in an existing directory, on success.

    A kill or a full disk leaves the old file at `path`. Only a kill leaves the temporary file,
    whose name ends in .tmp. An OSError names the path.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically; see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def unwritten(path: Path, error: OSError) -> OSError:
    """Return an error that names the file; the system's error may name none."""
    return OSError(f"cannot write {path}: {error.strerror or error}")
