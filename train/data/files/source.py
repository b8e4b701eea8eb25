"""Files to parts: a file is read as stretches of about 2 MiB that begin and end with a row.

This file knows kinds of files and compression; cuts.py, arrays.py and tables.py know where rows
end; what stands in a row is rows.py's part. The division depends on the file alone, so that a part
can be tokenised by any process, kept, and found again. Memory: one part and the longest row,
whatever the size of the file.

How a text file is divided into documents
    A file whose lines are long (500 bytes and more on average) and never blank holds one
    document a line, as Wikipedia dumps do. Any other text file is one document: its short or
    blank-separated lines are the lines and paragraphs of one text; where it is longer than a part,
    one document a part, cut at a line's end. Judged on the first MiB.
"""

import contextlib
import dataclasses
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from train.data.files.arrays import array_parts
from train.data.files.chunks import BOM, PEEK, Reader, Stream, line_parts, read_fully
from train.data.files.library import library
from train.data.files.shard import PART, Part
from train.data.files.tables import ARROW, PARQUET, arrow_files, table_parts

TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".json", ".jsonl")
PACKED_SUFFIXES = (".gz", ".zst")
TABLE_SUFFIXES = (PARQUET, ARROW)
ZSTD_BLOCK = 1 << 10  # bytes unpacked at once: 32 MiB at most, whatever they hold
LONG_LINE = 500  # bytes; prose wrapped by hand has lines of 60-100, an article has thousands


def read_parts(path: Path, *, part: int = PART) -> Iterator[Part]:
    """Yields the parts of one file in order.

    Args:
        path: a `.txt`, `.json` or `.jsonl` file, also `.gz` or `.zst` of these, or `.parquet` or
            `.arrow`. A JSON file that begins with `[` is an array of rows, any other has one row a
            line; the suffix does not decide between the two.
        part: bytes of a part, rounded up to whole rows.

    Raises:
        ValueError: the file is missing, a directory, unreadable, empty, damaged, or of another
            kind, or needs a library that is not installed.
    """
    suffix = check_path(path)
    if suffix in TABLE_SUFFIXES:
        yield from table_parts(path, suffix, part)
        return
    damage = (OSError, EOFError, zlib.error, *_zstd_errors(path))
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as stream:
            yield from _sized(_stream_parts(path, stream, suffix, part), raw, path)
    except damage as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {why}") from error


def files_of(path: Path) -> list[Path]:
    """The files that a path stands for: itself, or those of a directory that `datasets` saved.

    Raises:
        ValueError: a directory of another kind.
    """
    return arrow_files(path) if path.is_dir() else [path]


def check_path(path: Path) -> str:
    """Returns the suffix that tells the kind of file, that of the compression left off.

    Raises:
        ValueError: the file is missing, a directory, a pipe, or of another kind.
    """
    if not path.exists():
        raise ValueError(f"no such data file: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a directory: name its data files one by one")
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
            zstandard = library("zstandard", "zstd", path)
            begin = zstandard.ZstdDecompressor().decompressobj
            return contextlib.nullcontext(_Unpacked(_frames(raw, begin)))
        case _:
            return contextlib.nullcontext(raw)


class _Unpacked:
    """Pieces of a file, to be read like one."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._left = pieces, b""

    def read(self, size: int, /) -> bytes:
        piece = self._left or next(self._pieces, b"")
        self._left = piece[size:]
        return piece[:size]


def _frames(raw: BinaryIO, begin: Callable[[], Any]) -> Iterator[bytes]:
    """Unpacks zstd frame by frame: the library's reader takes one that was cut off for whole."""
    frame, packed = None, b""
    while packed := packed or raw.read(ZSTD_BLOCK):
        frame = frame or begin()
        if piece := frame.decompress(packed):
            yield piece
        frame, packed = (None, frame.unused_data) if frame.eof else (frame, b"")
    if frame is not None:
        raise EOFError("it ends in the middle of a zstd frame")


def _zstd_errors(path: Path) -> tuple[type[Exception], ...]:
    if path.suffix.lower() != ".zst":
        return ()
    return (library("zstandard", "zstd", path).ZstdError,)


def _sized(parts: Iterator[Part], raw: BinaryIO, path: Path) -> Iterator[Part]:
    """Gives the parts of a compressed file their compressed size."""
    packed = path.suffix.lower() in PACKED_SUFFIXES
    before = 0
    for part in parts:
        if packed:
            before, size = raw.tell(), raw.tell() - before
            part = dataclasses.replace(part, size=size)
        yield part


def _stream_parts(path: Path, stream: Stream, suffix: str, part: int) -> Iterator[Part]:
    head = read_fully(stream, PEEK)
    begin = head.removeprefix(BOM).lstrip()
    if not begin and len(head) < PEEK:
        raise ValueError(f"{path} is empty")
    reader = Reader(stream, head)
    if suffix in TEXT_SUFFIXES:
        texts = has_document_per_line(head)
        yield from line_parts(reader, "texts" if texts else "text", part)
    elif begin.startswith(b"["):
        yield from array_parts(reader, part)
    else:
        yield from line_parts(reader, "lines", part)
