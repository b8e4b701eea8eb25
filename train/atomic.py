"""Files that are whole or not there: what is written gets its name when the last byte is."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Inside, another name to write the file under; it gets its own when the block ends well.

    A kill or a full disk leaves what was at path before; only a kill leaves the other name, which
    ends in .tmp.

    Args:
        path: in a directory that exists.

    Raises:
        OSError: it cannot be written; names path.
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
    """Writes a text file; see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def unwritten(path: Path, error: OSError) -> OSError:
    """An error that says which file could not be written; the system's may name none."""
    return OSError(f"cannot write {path}: {error.strerror or error}")
