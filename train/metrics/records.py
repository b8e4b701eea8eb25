"""What a run writes down line by line, in JSON, each line with its step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.atomic import atomic_write, unwritten


class Records:
    """A file of such lines; a run that goes on from a checkpoint continues it."""

    def __init__(self, path: Path, *, start: int):
        """Drops what will be written again, and what a kill cut off. Makes no file.

        Args:
            path: of the file; its directory exists.
            start: step the run goes on from: lines of later steps go.

        Raises:
            OSError: it cannot be read or replaced; then it is as it was.
            ValueError: as `read_records`.
        """
        self._path = path
        kept = b"".join(line for line, record in _lines(path) if record["step"] <= start)
        if path.is_file() and path.stat().st_size != len(kept):
            with atomic_write(path) as temporary:
                temporary.write_bytes(kept)

    def write(self, *lines: Mapping[str, Any]) -> None:
        """Adds lines, each with its "step". None at all: only makes the file.

        They are handed to the system when this returns, so that a kill loses none.

        Raises:
            OSError: naming the file and what to do.
        """
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        left = memoryview(text.encode())
        try:
            with self._path.open("ab", buffering=0) as file:
                while left:  # where the disk is full it takes a part first
                    left = left[file.write(left) :]
        except OSError as error:
            raise OSError(
                f"{unwritten(self._path, error)}; once it can be, the same command goes on from "
                "the last checkpoint"
            ) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """What a file holds; none where there is no file, and without a line that a kill cut off.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not JSON, or without a step; names file and line.
    """
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines and what they say."""
    # Ends of lines alone: texts may hold other characters at which str.splitlines parts.
    *whole, _ = (path.read_bytes() if path.is_file() else b"").split(b"\n")
    lines = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError('it has no "step"')
            lines.append((line + b"\n", record))
        except ValueError as error:
            raise ValueError(
                f"{path}:{number} is no record of a run: {error}; remove that line, or the file"
            ) from error
    return lines
