"""Parts to raw rows: what stands in a stretch of a file, one row at a time.

A row that cannot be read becomes a `Broken`, never an exception: whether it is skipped or fatal is
decided once, by the caller (dataset.py).
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from train.data.files.arrays import next_row, skip_space
from train.data.files.shard import LONGEST_ROW, Part
from train.data.files.source import read_parts


class Row(NamedTuple):
    """One row as it stands in the file.

    Attributes:
        line: line of the file on which it begins, from 1.
        size: bytes (characters in a JSON array) it takes in the file.
        value: the parsed JSON value; a document of a text file is `{"text": ...}`. Bytes that
            are not UTF-8 are lone surrogates in its strings (`errors="surrogateescape"`).
    """

    line: int
    size: int
    value: object


class Broken(NamedTuple):
    """A row that cannot be read.

    Attributes:
        line: line of the file on which it begins, from 1.
        size: as in `Row`.
        reason: what is wrong with it, in a few words.
    """

    line: int
    size: int
    reason: str


def read_rows(path: Path) -> Iterator[Row | Broken]:
    """Yields the rows of one file in order.

    Raises:
        ValueError: the file cannot be read (source.read_parts).
    """
    for part in read_parts(path):
        yield from rows_of(part)


def rows_of(part: Part) -> Iterator[Row | Broken]:
    """Yields the rows of a part in order."""
    match part.kind:
        case "array":
            return _array_rows(part)
        case "lines":
            return _line_rows(part)
        case "texts":
            return (Row(number, size, {"text": text}) for number, size, text in _lines(part))
        case "text":
            return _whole_text(part)
        case "long":
            reason = f"a row of {part.size:,} bytes, more than {LONGEST_ROW:,}"
            return iter([Broken(part.line, part.size, reason)])


def _lines(part: Part) -> Iterator[tuple[int, int, str]]:
    """Yields (line number, bytes, text) of every line that is not blank."""
    for number, line in enumerate(io.BytesIO(part.data), start=part.line):
        text = line.strip()
        if text:
            yield number, len(line), text.decode("utf-8", "surrogateescape")


def _whole_text(part: Part) -> Iterator[Row | Broken]:
    try:
        text = part.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = part.line + part.data.count(b"\n", 0, error.start)
        reason = f"byte 0x{part.data[error.start]:02x} is not UTF-8"
        yield Broken(line, len(part.data), reason)
        return
    if text.strip():  # a part of white space is the end of a long text
        yield Row(part.line, len(part.data), {"text": text})


def _line_rows(part: Part) -> Iterator[Row | Broken]:
    decode = json.JSONDecoder().raw_decode  # json.loads looks for white space around it first
    for number, size, text in _lines(part):
        try:
            value, end = decode(text)
            if end < len(text):
                raise json.JSONDecodeError("Extra data", text, end)
        except (ValueError, RecursionError) as error:
            yield Broken(number, size, _json_reason(error, 0))
        else:
            yield Row(number, size, value)


def _array_rows(part: Part) -> Iterator[Row | Broken]:
    """Yields the elements of a JSON array; after a syntax error goes on at the next row."""
    text = part.data.decode("utf-8", "surrogateescape")
    decode = json.JSONDecoder().raw_decode
    start, line, counted = skip_space(text, text.index("[") + 1), part.line, 0
    while text[start : start + 1] != "]":
        line, counted = line + text.count("\n", counted, start), start
        try:
            value, end = decode(text, start)
            after = skip_space(text, end)
            separator = text[after : after + 1]
            if separator not in (",", "]"):
                raise ValueError("no ',' or ']' after the row")
        except (ValueError, RecursionError) as error:
            following = next_row(text, start)
            reason = _json_reason(error, part.line - 1)
            yield Broken(line, (following or len(text)) - start, reason)
            if following is None:
                return
            start = following
            continue
        yield Row(line, end - start, value)
        start = skip_space(text, after + 1) if separator == "," else after
    rest = skip_space(text, start + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        yield Broken(line, len(text) - rest, "text after the end of the array")


def _json_reason(error: Exception, lines_before: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        # lineno is 1 where rows are lines
        line = "" if error.lineno == 1 else f"line {error.lineno + lines_before} "
        return f"not JSON: {error.msg} ({line}column {error.colno})"
    if isinstance(error, RecursionError):
        return "not JSON that can be read: nested too deeply"
    return f"not JSON: {error}"
