"""Tables to chunks of JSON lines: Parquet, and Arrow as the `datasets` library writes it."""

import contextlib
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from train.data.files.readers import CHUNK, LONGEST_ROW, PARQUET, Chunk, library

EXTRA = "parquet"
_LIST, _SPLITS = "state.json", "dataset_dict.json"  # of `save_to_disk`
_MAGIC = b"ARROW1"  # begins Arrow's file format, and not its stream
_ROWS = 1000  # read at once, where they are small


def table_chunks(path: Path, suffix: str, size: int = CHUNK) -> Iterator[Chunk]:
    """Yield the rows of a table in order, about `size` bytes of JSON at a time.

    Bytes are read as text; other values that JSON cannot hold become their string. Memory: some
    chunks and, of a Parquet file, the pages of a row group that are being read.

    Raises:
        ValueError: the table cannot be read, or pyarrow is not installed.
    """
    arrow = library("pyarrow", EXTRA, path)
    number, data, held = 0, [], 0
    try:
        with contextlib.closing(_batches(path, suffix, size)) as batches:
            each = path.stat().st_size // max(1, next(batches))  # bytes of a row in the file
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                line = _line(row)
                long = len(line) > LONGEST_ROW
                if data and (long or held >= size):
                    yield _chunk(data, number - 1, each)
                    data, held = [], 0
                if long:
                    yield Chunk("long", number, b"", len(line))
                else:
                    data.append(line)
                    held += len(line)
            if data:
                yield _chunk(data, number, each)
    except (OSError, ValueError, arrow.ArrowException) as error:
        # Not jaxattn.errors.first_line: worker processes that tokenize import no jax.
        raise ValueError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from error


def arrow_files(directory: Path) -> list[Path]:
    """Return the files of a directory that `datasets` saved (`save_to_disk`), in order.

    Raises:
        ValueError: the directory is of another kind, has several splits, or lists no file.
    """
    if (directory / _SPLITS).exists():
        splits = ", ".join(sorted(path.parent.name for path in directory.glob(f"*/{_LIST}")))
        raise ValueError(f"{directory} has several splits ({splits}): name one of them, DIR/SPLIT")
    if not (directory / _LIST).exists():
        raise ValueError(
            f"{directory} is a directory, and not one that the datasets library saved: name its"
            f" data files, as --data {directory}/*.jsonl"
        )
    try:
        listed = json.loads((directory / _LIST).read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in listed["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory / _LIST} does not list data files: {error}") from error
    if not names:
        raise ValueError(f"{directory} holds no rows")
    return [directory / name for name in names]


def _line(row: dict[str, Any]) -> bytes:
    """Return a row as JSON; bytes that are not UTF-8 stay as they are (records.py)."""
    text = json.dumps(row, default=_json, ensure_ascii=False)
    return text.encode("utf-8", "surrogateescape")


def _json(value: object) -> str:
    """Convert a value that JSON cannot hold; bytes are text that is not marked as such."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _chunk(data: list[bytes], last: int, size: int) -> Chunk:
    """Return the chunk of rows up to number `last`, each of `size` bytes in the file."""
    return Chunk("lines", last - len(data) + 1, b"\n".join(data), size * len(data))


def _batches(path: Path, suffix: str, size: int) -> Generator[Any]:
    """Yield the number of rows, then the rows in record batches of some `size` bytes."""
    if suffix == PARQUET:
        parquet = library("pyarrow.parquet", EXTRA, path)
        with parquet.ParquetFile(path) as file:
            about = file.metadata
            yield about.num_rows
            groups = [about.row_group(i) for i in range(about.num_row_groups)]
            largest = max((g.total_byte_size / max(1, g.num_rows) for g in groups), default=1)
            yield from file.iter_batches(batch_size=_rows_at_once(size, largest))
        return
    ipc = library("pyarrow.ipc", EXTRA, path)
    with library("pyarrow", EXTRA, path).memory_map(str(path)) as file:
        # Two passes: the head of a stream does not hold the number of rows.
        yield sum(batch.num_rows for batch in _record_batches(ipc, file))
        for batch in _record_batches(ipc, file):
            step = _rows_at_once(size, batch.nbytes / max(1, batch.num_rows))
            yield from (batch.slice(at, step) for at in range(0, batch.num_rows, step))


def _record_batches(ipc: Any, file: Any) -> Iterator[Any]:
    """Yield the batches of a stream, as `datasets` writes it, or of a file of batches (Feather)."""
    file.seek(0)
    if file.read(len(_MAGIC)) == _MAGIC:
        reader = ipc.open_file(file)
        yield from map(reader.get_batch, range(reader.num_record_batches))
        return
    file.seek(0)
    yield from ipc.open_stream(file)


def _rows_at_once(size: int, row: float) -> int:
    return max(1, min(_ROWS, int(size / max(1, row))))
