"""Files to parts: a file is read as stretches of about 16 MiB that begin and end with a row.

This file knows files, compression and where rows end; what stands in a row is rows.py's part. The
division depends on the file alone, so that a part can be tokenised by any process, kept, and found
again. Memory: one part and the longest row, whatever the size of the file.

How a text file is divided into documents
    A file whose lines are long (500 bytes and more on average) and never blank holds one
    document a line, as Wikipedia dumps do. Any other text file is one document: its short or
    blank-separated lines are the lines and paragraphs of one text; where it is longer than a part,
    one document a part, cut at a line's end. Judged on the first MiB.
"""

import contextlib
import dataclasses
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".json", ".jsonl")
PACKED_SUFFIXES = (".gz", ".zst")
PARQUET = ".parquet"
PART = 16 << 20  # bytes of rows
LONGEST_ROW = 32 << 20  # bytes; tokenising one takes some fifty times as much memory
LONG_LINE = 500  # bytes; prose wrapped by hand has lines of 60-100, an article has thousands
_PEEK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 1000

Kind = Literal["array", "lines", "texts", "text", "long"]


@runtime_checkable
class _Stream(Protocol):
    """A file or a decompressor."""

    def read(self, size: int, /) -> bytes: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file.

    Attributes:
        kind: "array": a JSON array; "lines": a JSON value a line; "texts": a document a line;
            "text": one document; "long": a row too long to be read, left out of `data`.
        line: line of the file on which it begins, from 1; of a parquet file, the row.
        data: its bytes, uncompressed.
        size: bytes it takes in the file.
    """

    kind: Kind
    line: int
    data: bytes
    size: int


def read_parts(path: Path, *, part: int = PART) -> Iterator[Part]:
    """Yields the parts of one file in order.

    Args:
        path: a `.txt`, `.json` or `.jsonl` file, also `.gz` or `.zst` of these, or `.parquet`. A
            JSON file that begins with `[` is an array of rows, any other has one row a line; the
            suffix does not decide between the two.
        part: bytes of a part, rounded up to whole rows.

    Raises:
        ValueError: the file is missing, a directory, unreadable, empty, damaged, or of another
            kind, or needs a library that is not installed.
    """
    suffix = check_path(path)
    if suffix == PARQUET:
        yield from _parquet_parts(path)
        return
    damage = (OSError, EOFError, zlib.error, *_zstd_errors(path))
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            yield from _sized(_stream_parts(path, stream, suffix, part), raw, path)
    except damage as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {why}") from error


def check_path(path: Path) -> str:
    """Returns the suffix that tells the kind of file, that of the compression left off.

    Raises:
        ValueError: the file is missing, a directory, or of another kind.
    """
    if not path.exists():
        raise ValueError(f"no such data file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory: name its data files one by one")
    suffix = path.suffix.lower()
    if suffix in PACKED_SUFFIXES:
        suffix = Path(path.stem).suffix.lower()
    if suffix not in (*TEXT_SUFFIXES, *JSON_SUFFIXES, PARQUET):
        known = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, PARQUET))
        packed = ", ".join(PACKED_SUFFIXES)
        raise ValueError(
            f"{path}: unknown kind of file '{suffix}' (known: {known}; the first three also as"
            f" {packed})"
        )
    return suffix


def has_document_per_line(head: bytes) -> bool:
    """Whether a text file that begins with `head` holds one document a line (see above)."""
    lines = head.strip().split(b"\n")
    return all(line.strip() for line in lines) and len(head) >= LONG_LINE * len(lines)


def _decompressed(path: Path, raw: BinaryIO) -> contextlib.AbstractContextManager[Any]:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(raw)
        case ".zst":
            library = _library("zstandard", "zstd", path)
            return library.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        case _:
            return contextlib.nullcontext(raw)


def _zstd_errors(path: Path) -> tuple[type[Exception], ...]:
    if path.suffix.lower() != ".zst":
        return ()
    return (_library("zstandard", "zstd", path).ZstdError,)


def _library(name: str, extra: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{path} needs {name}, which is not installed: pip install 'internlm2-jax[{extra}]'"
        ) from error


def _sized(parts: Iterator[Part], raw: BinaryIO, path: Path) -> Iterator[Part]:
    """Gives the parts of a compressed file their compressed size."""
    packed = path.suffix.lower() in PACKED_SUFFIXES
    before = 0
    for part in parts:
        if packed:
            before, size = raw.tell(), raw.tell() - before
            part = dataclasses.replace(part, size=size)
        yield part


def _stream_parts(path: Path, stream: _Stream, suffix: str, part: int) -> Iterator[Part]:
    head = _read(stream, _PEEK)
    begin = head.removeprefix(_BOM).lstrip()
    if not begin and len(head) < _PEEK:
        raise ValueError(f"{path} is empty")
    reader = _Reader(stream, head)
    if suffix in TEXT_SUFFIXES:
        texts = has_document_per_line(head)
        yield from _line_parts(reader, "texts" if texts else "text", part)
    elif begin.startswith(b"["):
        yield from _array_parts(reader, part)
    else:
        yield from _line_parts(reader, "lines", part)


def _read(stream: _Stream, size: int) -> bytes:
    """Reads `size` bytes or to the end; a decompressor may give fewer at a time."""
    pieces, left = [], size
    while left and (piece := stream.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


class _Reader:
    """A stream of which the beginning was read."""

    def __init__(self, stream: _Stream, head: bytes):
        self._stream, self._head = stream, head.removeprefix(_BOM)

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + _read(self._stream, size - len(head))


def _line_parts(reader: _Reader, kind: Kind, part: int) -> Iterator[Part]:
    """Cuts after the last end of line; a line longer than `LONGEST_ROW` is passed over."""
    line, data, ended = 1, b"", False
    while not ended:
        more = reader.read(part + 1)  # one more than a file of one part has
        data, ended = data + more, len(more) <= part
        cut = len(data) if ended else data.rfind(b"\n") + 1
        if cut:
            yield Part(kind, line, data[:cut], cut)
            line += data.count(b"\n", 0, cut)
            data = data[cut:]
        if len(data) > LONGEST_ROW:
            size, data = _pass_over(reader, data, part)
            yield Part("long", line, b"", size)
            line += 1


def _pass_over(reader: _Reader, data: bytes, step: int) -> tuple[int, bytes]:
    """Returns the bytes of the line that `data` begins, and what was read of the next one."""
    size = 0
    while (end := data.find(b"\n")) < 0:
        size += len(data)
        data = reader.read(step)
        if not data:
            return size, b""
    return size + end + 1, data[end + 1 :]


def _array_parts(reader: _Reader, part: int) -> Iterator[Part]:
    """Cuts at the comma after a row; each part is an array of its own.

    The text is read as Latin-1: JSON's own characters are ASCII, and a place in it is one in the
    file.
    """
    decode = json.JSONDecoder().raw_decode
    text = reader.read(_PEEK).decode("latin-1")
    ended = False
    line, begin = 1, text.index("[") + 1
    begun, at = True, begin

    def read_on() -> bool:
        nonlocal text, ended
        more = reader.read(max(_PEEK, len(text))).decode("latin-1")
        text, ended = text + more, not more
        return not ended

    while True:
        start = skip_space(text, at)
        try:
            if start >= len(text) or text[start] == "]":
                raise StopIteration
            _, end = decode(text, start)
            after = skip_space(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("no ',' or ']' after the row", text, after)
        except (ValueError, RecursionError, StopIteration) as error:
            if not ended and _may_go_on(error, text, start) and read_on():
                continue
            following = None if isinstance(error, StopIteration) else next_row(text, start)
            if following is not None:
                at = following
                continue
            if read_on():
                continue
            break
        if text[after] == "]":
            at = after
            continue
        at = after + 1
        if at - begin >= part:
            head = text[:after] if begun else "[" + text[begin:after]
            yield Part("array", line, (head + "]").encode("latin-1"), at - (0 if begun else begin))
            line += text.count("\n", 0 if begun else begin, after)
            text, begun, begin, at = text[at:], False, 0, 0
    data = text if begun else "[" + text[begin:]
    yield Part("array", line, data.encode("latin-1"), len(text))


def _may_go_on(error: Exception, text: str, start: int) -> bool:
    """Whether a row may be unreadable only because the text read so far ends in it."""
    if isinstance(error, StopIteration):
        return start >= len(text)
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")


def next_row(text: str, start: int) -> int | None:
    """Returns where the row after the unreadable one at `start` begins; None at the end.

    Rows that begin a line are recognised by the indentation of the broken one, rows of an array
    written on one line by the `}, {` between objects.
    """
    indent = text[text.rfind("\n", 0, start) + 1 : start]
    begins_line = not indent.strip() and len(indent) < start
    pattern = rf"\n{indent}(?=\{{)" if begins_line else r"\}\s*,\s*(?=\{)"
    match = re.compile(pattern).search(text, start)
    return match.end() if match else None


def skip_space(text: str, position: int) -> int:
    """Returns the place of the first character from `position` on that is not white space."""
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


def _parquet_parts(path: Path) -> Iterator[Part]:
    """Writes rows as JSON lines; what JSON cannot hold becomes its string."""
    library = _library("pyarrow.parquet", "parquet", path)
    try:
        with library.ParquetFile(path) as file:
            total = max(1, file.metadata.num_rows)
            row, size = 1, path.stat().st_size
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                rows = [json.dumps(value, default=str) for value in batch.to_pylist()]
                data = "\n".join(rows).encode()
                yield Part("lines", row, data, size * len(rows) // total)
                row += len(rows)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        raise ValueError(f"{path} cannot be read: {error}") from error
