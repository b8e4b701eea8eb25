"""Checked reads of files that a user names: JSON, Git LFS pointers, files that are not regular."""

import json
from pathlib import Path
from typing import Any

LFS_HEADER = b"version https://git-lfs.github.com/spec/v1"


def check_file(path: Path) -> None:
    """Check that a path is a regular file with content of its own.

    Raises:
      FileNotFoundError: there is no file of this name.
      ValueError: the path is a directory, FIFO or device, or the file is a Git LFS pointer.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    if not path.is_file():  # opening a FIFO would block for ever
        raise ValueError(f"{path} is not a regular file")
    with path.open("rb") as file:
        if file.read(len(LFS_HEADER)) == LFS_HEADER:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
                f"{path.parent}, or download the file again"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      FileNotFoundError: there is no file of this name.
      ValueError: the file is not regular, a Git LFS pointer, or not a JSON object in UTF-8.
    """
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file with the indentation of HF."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
