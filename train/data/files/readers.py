"""Files to chunks: a file is read in stretches of about 2 MiB that begin and end with a row.

This module handles kinds of files and compression; records.py reads the rows of a chunk, tables.py
the rows of a table. The division depends on the file alone, so that any process can tokenize a
chunk, and the cache can keep it. Memory: one chunk and the longest row, whatever the size of the
file; a JSON array is read whole.

Division of a text file into documents
    A file whose lines are long (500 bytes and more on average) and never blank has one document a
    line, as Wikipedia dumps do. Any other text file is one document: its short or blank-separated
    lines are the lines and paragraphs of one text; a file longer than a chunk is one document a
    chunk, cut at a line's end. Judged by the first MiB.
"""

import contextlib
import dataclasses
import functools
import gzip
import importlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from models.files import check_file
from train.data.files.json_array import walk_arrays

CHUNK = 2 << 20  # bytes of rows: a second or two of work, so that all processes end together
LONGEST_ROW = 32 << 20  # bytes; tokenizing one takes some fifty times as much memory
LARGEST_ARRAY = 1 << 30  # bytes of a JSON array, which is held in memory two times
PEEK = 1 << 20  # bytes by which a file is judged
BOM = b"\xef\xbb\xbf"

TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".json", ".jsonl")
PACKED_SUFFIXES = (".gz", ".zst")
PARQUET, ARROW = TABLE_SUFFIXES = (".parquet", ".arrow")
ZSTD_BLOCK = 1 << 10  # bytes unpacked at once: at most 32 MiB come out
LONG_LINE = 500  # bytes; prose wrapped by hand has lines of 60-100, an article has thousands
_PACKED_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}

Kind = Literal["array", "lines", "texts", "text", "long"]


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of a file."""

    # "array": JSON arrays; "lines": a JSON value a line; "texts": a document a line; "text": one
    # document; "long": a row too long to be read, not in `data`
    kind: Kind
    line: int  # line of the file on which the chunk begins, from 1; of a table, the row
    data: bytes  # bytes of the rows, uncompressed
    size: int  # bytes that the chunk takes in the file


def text_chunks(path: Path, suffix: str, size: int) -> Iterator[Chunk]:
    """Yield the chunks of a text or JSON file in order, each of `size` bytes and a whole row.

    A JSON file that begins with `[` is an array of rows (or several arrays), any other has one row
    a line, whether its `suffix` (without that of the compression) is .json or .jsonl.

    Raises:
        ValueError: the file is unreadable, empty, damaged, compressed without the suffix, not
            UTF-8 but UTF-16 or UTF-32, or an array above `LARGEST_ARRAY` bytes; or it needs a
            library that is not installed.
    """
    packed, before = path.suffix.lower() in PACKED_SUFFIXES, 0
    try:
        with path.open("rb") as raw:
            for chunk in _chunks(path, _Reader(_pieces(path, raw)), suffix, size):
                if packed:
                    before, packed_size = raw.tell(), raw.tell() - before
                    chunk = dataclasses.replace(chunk, size=packed_size)
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {why}") from error


def check_path(path: Path) -> str:
    """Return the suffix without that of the compression; raise ValueError for an unusable file."""
    if not path.exists():
        pattern = any(character in str(path) for character in "*?[")
        hint = ": it is a pattern, which only a shell expands, after '--data ' and not after '='"
        raise ValueError(f"no such data file: {path}{hint if pattern else ''}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory: name its data files, as --data {path}/*.jsonl")
    if not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, and data are read twice: write a file")
    suffix = path.suffix.lower()
    if suffix in PACKED_SUFFIXES:
        suffix = Path(path.stem).suffix.lower()
    if suffix not in (*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES):
        known = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES))
        packed = ", ".join(PACKED_SUFFIXES)
        raise ValueError(
            f"{path}: unknown kind of file '{suffix}' (known: {known}; the first three also as"
            f" {packed})"
        )
    with contextlib.suppress(OSError):  # reading it reports it with the file's name
        check_file(path)
    return suffix


def library(name: str, extra: str, path: Path) -> Any:
    """Import an optional library, or raise ValueError with the extra that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{path} needs {name}, which is not installed: pip install 'internlm2-jax[{extra}]'"
        ) from error


def has_document_per_line(head: bytes) -> bool:
    """Return true if a text file that begins with `head` has one document a line."""
    lines = head.strip().split(b"\n")
    return all(line.strip() for line in lines) and len(head) >= LONG_LINE * len(lines)


def _pieces(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Return the bytes of a file, uncompressed, in pieces of any size."""
    match path.suffix.lower():
        case ".gz":
            return iter(functools.partial(gzip.open(raw).read, PEEK), b"")
        case ".zst":
            return _frames(path, raw)
        case _:
            return iter(functools.partial(raw.read, PEEK), b"")


def _frames(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Unpack zstd frame by frame: the library's own reader accepts a frame that was cut off."""
    zstandard = library("zstandard", "zstd", path)
    frame, packed = None, b""
    try:
        while packed := packed or raw.read(ZSTD_BLOCK):
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            if piece := frame.decompress(packed):
                yield piece
            frame, packed = (None, frame.unused_data) if frame.eof else (frame, b"")
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise EOFError("it ends in the middle of a zstd frame")


class _Reader:
    """Bytes that come in pieces, to be read in any amount."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._left = pieces, b""

    def read(self, size: int) -> bytes:
        """Return `size` bytes, or the rest."""
        found, count = [self._left], len(self._left)
        while count < size and (piece := next(self._pieces, b"")):
            found.append(piece)
            count += len(piece)
        data = b"".join(found)
        self._left = data[size:]
        return data[:size]

    def put_back(self, data: bytes) -> None:
        """Let the next call read `data` again."""
        self._left = data + self._left


def _chunks(path: Path, reader: _Reader, suffix: str, size: int) -> Iterator[Chunk]:
    head = reader.read(PEEK)
    reader.put_back(head.removeprefix(BOM))
    begin = head.removeprefix(BOM).lstrip()
    if not begin and len(head) < PEEK:
        raise ValueError(f"{path} is empty")
    for magic, packing in _PACKED_MAGIC.items():
        if head.startswith(magic):
            known = ", ".join(PACKED_SUFFIXES)
            raise ValueError(
                f"{path} is compressed with {packing}: unpack it, or give it the suffix of its"
                f" compression (known: {known})"
            )
    if encoding := _wide_encoding(head):
        raise ValueError(
            f"{path} is {encoding}, not UTF-8: convert it with"
            f" iconv -f {encoding} -t UTF-8 FILE > NEW"
        )
    if suffix in TEXT_SUFFIXES:
        texts = has_document_per_line(head)
        yield from _line_chunks(reader, "texts" if texts else "text", size)
    elif begin.startswith(b"["):
        yield from _array_chunks(path, reader, size)
    else:
        yield from _line_chunks(reader, "lines", size)


def _wide_encoding(head: bytes) -> str | None:
    """Return the name of UTF-16 or UTF-32, with a byte order mark or without."""
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "UTF-32"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    # ASCII characters in UTF-16 have a zero byte each; in UTF-8 no text has any.
    for name, first in (("UTF-16LE", 1), ("UTF-16BE", 0)):
        zeros = head[first:64:2]
        if len(zeros) > 1 and not any(zeros) and all(head[1 - first : 64 : 2]):
            return name
    return None


def _line_chunks(reader: _Reader, kind: Kind, size: int) -> Iterator[Chunk]:
    """Cut after the last end of line; pass over a line longer than `LONGEST_ROW`."""
    line, data, ended = 1, b"", False
    while not ended:
        more = reader.read(size + 1)  # one more than a file of one chunk has
        data, ended = data + more, len(more) <= size
        cut = len(data) if ended else data.rfind(b"\n") + 1
        if cut:
            yield Chunk(kind, line, data[:cut], cut)
            line += data.count(b"\n", 0, cut)
            data = data[cut:]
        if len(data) > LONGEST_ROW:
            passed, data = _pass_over(reader, data, size)
            yield Chunk("long", line, b"", passed)
            line += 1


def _pass_over(reader: _Reader, data: bytes, step: int) -> tuple[int, bytes]:
    """Return the bytes of the line that `data` begins, and the beginning of the next line."""
    size = 0
    while (end := data.find(b"\n")) < 0:
        size += len(data)
        data = reader.read(step)
        if not data:
            return size, b""
    return size + end + 1, data[end + 1 :]


def _array_chunks(path: Path, reader: _Reader, size: int) -> Iterator[Chunk]:
    """Cut arrays after an element that can be read; each chunk but the first begins with `[`.

    The text is read as Latin-1: JSON's own characters are ASCII, and a place in it is one in the
    file.
    """
    raw = reader.read(LARGEST_ARRAY + 1)
    if len(raw) > LARGEST_ARRAY:
        cat = {".gz": "zcat FILE | ", ".zst": "zstdcat FILE | "}.get(path.suffix.lower(), "")
        raise ValueError(
            f"{path} is a JSON array of more than {LARGEST_ARRAY:,} bytes, which would be held in"
            f" memory: convert it to JSON Lines with {cat}jq -c '.[]'{'' if cat else ' FILE'} >"
            " NEW.jsonl"
        )
    text = raw.decode("latin-1")
    del raw
    begin, line, opening = 0, 1, ""

    def chunk(end: int) -> Chunk:
        data = (opening + text[begin:end].removesuffix(",") + "]").encode("latin-1")
        return Chunk("array", line, data, end - begin)

    for element in walk_arrays(text):
        if len(text) - begin < min(size, LONGEST_ROW):
            break  # the rest is one chunk, whose rows records.py parses
        long = element.end - element.start > LONGEST_ROW
        end = element.start if long else element.end
        if (long and end > begin) or (element.error is None and end - begin >= size):
            yield chunk(end)
            line, begin, opening = line + text.count("\n", begin, end), end, "["
        if long:
            yield Chunk("long", line, b"", element.end - begin)
            line, begin = line + text.count("\n", begin, element.end), element.end
    if begin < len(text):
        yield Chunk("array", line, (opening + text[begin:]).encode("latin-1"), len(text) - begin)
