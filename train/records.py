"""What a run wrote down line by line, in JSON, each line with its step."""

import json
from pathlib import Path


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, each with its end, or none where there is no file.

    One that was cut off by a kill, or is being written, is not whole.
    """
    text = path.read_text() if path.is_file() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def text_until(path: Path, step: int) -> str:
    """What to keep of a file when a run goes on from `step`: what was written up to there."""
    return "".join(line for line in whole_lines(path) if json.loads(line)["step"] <= step)
