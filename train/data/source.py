"""Files to raw rows: what a `.txt`, `.json` or `.jsonl` file holds, one row at a time.

This file knows files, lines and JSON syntax; what a row means is formats.py's part. A row that
cannot be read becomes a `Broken`, never an exception: whether it is skipped or fatal is decided
once, by the caller (dataset.py).

How a text file is divided into documents
    A file whose lines are long (500 bytes and more on average) and never blank holds one
    document a line, as Wikipedia dumps do. Any other text file is one document: its short or
    blank-separated lines are the lines and paragraphs of one text. Judged on the first MiB.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".json", ".jsonl")
LONG_LINE = 500  # bytes; prose wrapped by hand has lines of 60-100, an article has thousands
_PEEK = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file.

    Attributes:
        line: line of the file on which it begins, from 1.
        size: bytes (characters in a JSON array) it takes in the file, for the progress bar.
        value: the parsed JSON value; a document of a text file is `{"text": ...}`. Bytes that
            are not UTF-8 are lone surrogates in its strings (`errors="surrogateescape"`).
    """

    line: int
    size: int
    value: object


@dataclasses.dataclass(frozen=True, slots=True)
class Broken:
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

    Memory: one row for JSON lines and for one document a line; the whole file for a JSON array
    and for a text that is one document.

    Args:
        path: a `.txt`, `.json` or `.jsonl` file. A JSON file that begins with `[` is an array of
            rows, any other has one row a line; the suffix does not decide between the two.

    Raises:
        ValueError: the file is missing, a directory, unreadable, empty, or of another kind.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise ValueError(f"no such data file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory: name its data files one by one")
    if suffix not in TEXT_SUFFIXES + JSON_SUFFIXES:
        known = ", ".join(TEXT_SUFFIXES + JSON_SUFFIXES)
        raise ValueError(f"{path}: unknown kind of file '{suffix}' (known: {known})")
    try:
        with path.open("rb") as file:
            head = file.read(_PEEK)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    begin = head.removeprefix(_BOM).lstrip()
    if not begin and len(head) < _PEEK:
        raise ValueError(f"{path} is empty")
    if suffix in TEXT_SUFFIXES:
        return _line_texts(path) if has_document_per_line(head) else _whole_text(path)
    return _array_rows(path) if begin.startswith(b"[") else _line_rows(path)


def has_document_per_line(head: bytes) -> bool:
    """Whether a text file that begins with `head` holds one document a line (see above)."""
    lines = head.strip().split(b"\n")
    return all(line.strip() for line in lines) and len(head) >= LONG_LINE * len(lines)


def _lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yields (line number, bytes, text) of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = (line.removeprefix(_BOM) if number == 1 else line).strip()
            if text:
                yield number, len(line), text.decode("utf-8", "surrogateescape")


def _line_texts(path: Path) -> Iterator[Row | Broken]:
    for number, size, text in _lines(path):
        yield Row(number, size, {"text": text})


def _whole_text(path: Path) -> Iterator[Row | Broken]:
    data = path.read_bytes().removeprefix(_BOM)
    try:
        yield Row(1, len(data), {"text": data.decode("utf-8")})
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Broken(line, len(data), f"byte 0x{data[error.start]:02x} is not UTF-8")


def _line_rows(path: Path) -> Iterator[Row | Broken]:
    for number, size, text in _lines(path):
        try:
            yield Row(number, size, json.loads(text))
        except (ValueError, RecursionError) as error:
            yield Broken(number, size, _json_reason(error))


def _array_rows(path: Path) -> Iterator[Row | Broken]:
    """Yields the elements of a JSON array; after a syntax error goes on at the next row."""
    text = path.read_bytes().removeprefix(_BOM).decode("utf-8", "surrogateescape")
    decode = json.JSONDecoder().raw_decode
    start, line, counted = _skip_space(text, text.index("[") + 1), 1, 0
    while text[start : start + 1] != "]":
        line, counted = line + text.count("\n", counted, start), start
        try:
            value, end = decode(text, start)
            after = _skip_space(text, end)
            separator = text[after : after + 1]
            if separator not in (",", "]"):
                raise ValueError("no ',' or ']' after the row")
        except (ValueError, RecursionError) as error:
            following = _next_row(text, start)
            yield Broken(line, (following or len(text)) - start, _json_reason(error))
            if following is None:
                return
            start = following
            continue
        yield Row(line, end - start, value)
        start = _skip_space(text, after + 1) if separator == "," else after
    rest = _skip_space(text, start + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        yield Broken(line, len(text) - rest, "text after the end of the array")


def _next_row(text: str, start: int) -> int | None:
    """Returns where the row after the unreadable one at `start` begins; None at the end.

    Rows that begin a line are recognised by the indentation of the broken one, rows of an array
    written on one line by the `}, {` between objects.
    """
    indent = text[text.rfind("\n", 0, start) + 1 : start]
    begins_line = not indent.strip() and len(indent) < start
    pattern = rf"\n{indent}(?=\{{)" if begins_line else r"\}\s*,\s*(?=\{)"
    match = re.compile(pattern).search(text, start)
    return match.end() if match else None


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = "" if error.lineno == 1 else f"line {error.lineno} "  # 1 where rows are lines
        return f"not JSON: {error.msg} ({line}column {error.colno})"
    if isinstance(error, RecursionError):
        return "not JSON that can be read: nested too deeply"
    return f"not JSON: {error}"
