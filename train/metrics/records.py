"""Records of a run: files of JSON lines, each line with its step."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from train.atomic import atomic_write, unwritten


class Records:
    """A file of JSON lines that a resumed run continues; written by the first process alone."""

    def __init__(self, path: Path, *, start: int):
        """Drop lines of steps after `start`, which run again, and a line that a kill cut off.

        Creates no file. An OSError, or ValueError as of `read_records`, leaves the file unchanged.
        """
        self._path, self._first = path, jax.process_index() == 0
        if not self._first:
            return
        kept = b"".join(line for line, record in _lines(path) if record["step"] <= start)
        if path.is_file() and path.stat().st_size != len(kept):
            with atomic_write(path) as temporary:
                temporary.write_bytes(kept)

    def write(self, *lines: Mapping[str, Any]) -> None:
        """Append lines, each with its "step"; without lines, only create the file.

        The lines are handed to the system before the method returns, so that a kill loses none.
        Numbers that are not finite become null: JSON has no NaN.

        Raises:
            OSError: the file cannot be written; names the file and the remedy.
        """
        if not self._first:
            return
        text = "".join(json.dumps(_finite(dict(line)), ensure_ascii=False) + "\n" for line in lines)
        left = memoryview(text.encode())
        try:
            with self._path.open("ab", buffering=0) as file:
                while left:  # a disk that becomes full takes a part first
                    left = left[file.write(left) :]
        except OSError as error:
            raise OSError(
                f"{unwritten(self._path, error)}; once it can be, the same command goes on from "
                "the last checkpoint"
            ) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a file, without a last line that a kill cut off; no file has no lines.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON or has no step; names file and line.
    """
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return (line as bytes, record) of every complete line."""
    # Only \n ends a line: texts may hold other characters at which str.splitlines splits.
    *whole, _ = (path.read_bytes() if path.is_file() else b"").split(b"\n")
    lines = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError('it has no "step"')
            lines.append((line + b"\n", record))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number} is no record of a run: {error}; remove that line, or the file"
            ) from error
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(of) for name, of in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
