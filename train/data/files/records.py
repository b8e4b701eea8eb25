"""Files to records: chunks of a file, and the parsed rows of a chunk.

A row that cannot be read becomes a `BrokenRecord`, never an exception: dataset.py skips it or
stops at it.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from train.data.files.json_array import walk_arrays
from train.data.files.readers import (
    BOM,
    CHUNK,
    LONGEST_ROW,
    TABLE_SUFFIXES,
    Chunk,
    check_path,
    text_chunks,
)
from train.data.files.tables import table_chunks


class Record(NamedTuple):
    """One parsed row."""

    line: int  # line of the file on which it begins, from 1
    size: int  # bytes (characters in a JSON array) that it takes in the file
    # the JSON value; of a text file `{"text": ...}`. Bytes that are not UTF-8 are lone surrogates
    # in its strings (errors="surrogateescape")
    value: object


class BrokenRecord(NamedTuple):
    """A row that cannot be read."""

    line: int  # line of the file on which it begins, from 1
    size: int  # bytes that it takes in the file
    reason: str  # the error, in a few words


def read_chunks(path: Path, *, size: int = CHUNK) -> Iterator[Chunk]:
    """Yield the chunks of a file in order; raise ValueError with its name if it is unreadable."""
    suffix = check_path(path)
    return (table_chunks if suffix in TABLE_SUFFIXES else text_chunks)(path, suffix, size)


def read_records(path: Path) -> Iterator[Record | BrokenRecord]:
    """Yield the records of a file in order; raise ValueError as `read_chunks`."""
    for chunk in read_chunks(path):
        yield from records_of(chunk)


def records_of(chunk: Chunk) -> Iterator[Record | BrokenRecord]:
    """Yield the records of a chunk in order."""
    match chunk.kind:
        case "array":
            return _array_records(chunk)
        case "lines":
            return _line_records(chunk)
        case "texts":
            return (Record(number, size, {"text": text}) for number, size, text in _lines(chunk))
        case "text":
            return _whole_text(chunk)
        case "long":
            reason = f"a row of {chunk.size:,} bytes, more than {LONGEST_ROW:,}"
            return iter([BrokenRecord(chunk.line, chunk.size, reason)])


def _lines(chunk: Chunk) -> Iterator[tuple[int, int, str]]:
    """Yield (line number, bytes, text) of every line that is not blank."""
    for number, line in enumerate(io.BytesIO(chunk.data), start=chunk.line):
        text = line.strip()
        if text.startswith(BOM):  # of a file that was appended to this one
            text = text.removeprefix(BOM).lstrip()
        if text:
            yield number, len(line), text.decode("utf-8", "surrogateescape")


def _whole_text(chunk: Chunk) -> Iterator[Record | BrokenRecord]:
    try:
        text = chunk.data.replace(b"\n" + BOM, b"\n").decode("utf-8")
    except UnicodeDecodeError as error:
        line = chunk.line + error.object.count(b"\n", 0, error.start)
        reason = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
        yield BrokenRecord(line, len(chunk.data), reason)
        return
    if text.strip():  # a chunk of white space is the end of a long text
        yield Record(chunk.line, len(chunk.data), {"text": text})


def _line_records(chunk: Chunk) -> Iterator[Record | BrokenRecord]:
    decode = json.JSONDecoder().raw_decode  # json.loads looks for white space around it first
    for number, size, text in _lines(chunk):
        try:
            value, end = decode(text)
            if end < len(text):
                raise json.JSONDecodeError("text after the end of the row", text, end)
        except (ValueError, RecursionError) as error:
            yield BrokenRecord(number, size, _json_reason(error, 0))
        else:
            yield Record(number, size, value)


def _array_records(chunk: Chunk) -> Iterator[Record | BrokenRecord]:
    text = chunk.data.decode("utf-8", "surrogateescape")
    line, counted = chunk.line, 0
    for start, end, value, error in walk_arrays(text):
        line, counted = line + text.count("\n", counted, start), start
        if error is None:
            yield Record(line, end - start - (text[end - 1] == ","), value)
        else:
            size = len(text[start:end].encode("utf-8", "surrogateescape"))
            yield BrokenRecord(line, size, _json_reason(error, chunk.line - 1))


def _json_reason(error: Exception, lines_before: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        # lineno is 1 where rows are lines
        line = "" if error.lineno == 1 else f"line {error.lineno + lines_before} "
        return f"not JSON: {error.msg} ({line}column {error.colno})"
    if isinstance(error, RecursionError):
        return "not JSON that can be read: nested too deeply"
    return f"not JSON: {error}"
