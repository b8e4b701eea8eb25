"""Tables to parts: Parquet, and Arrow as the `datasets` library keeps it; rows as lines of JSON."""

import contextlib
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from jaxattn.errors import first_line
from train.data.files.library import library
from train.data.files.shard import LONGEST_ROW, PART, Part

PARQUET, ARROW = ".parquet", ".arrow"
EXTRA = "parquet"
_LIST, _SPLITS = "state.json", "dataset_dict.json"  # of `save_to_disk`
_MAGIC = b"ARROW1"  # begins Arrow's file format, and not its stream
_ROWS = 1000  # read at once, where they are small


def table_parts(path: Path, suffix: str, part: int = PART) -> Iterator[Part]:
    """Yields the rows of a table in order, about `part` bytes of JSON at a time.

    Bytes are taken for text; what else JSON cannot hold becomes its string. Memory: some parts
    and, of a Parquet file, the pages of a row group that are being read.

    Raises:
        ValueError: it cannot be read, or pyarrow is not installed.
    """
    arrow = library("pyarrow", EXTRA, path)
    row, size, data, held = 1, path.stat().st_size, [], 0
    try:
        with contextlib.closing(_batches(path, suffix, part)) as batches:
            total = max(1, next(batches))
            for value in (value for batch in batches for value in batch.to_pylist()):
                line = _line(value)
                if len(line) > LONGEST_ROW:
                    yield from _given(data, row, size // total)
                    yield Part("long", row + len(data), b"", len(line))
                    row, data, held = row + len(data) + 1, [], 0
                    continue
                data.append(line)
                held += len(line)
                if held >= part:
                    yield from _given(data, row, size // total)
                    row, data, held = row + len(data), [], 0
            yield from _given(data, row, size // total)
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def arrow_files(directory: Path) -> list[Path]:
    """The files of a directory that `datasets` saved (`save_to_disk`), in order.

    Raises:
        ValueError: it is no such directory, it holds several splits, or a file is missing.
    """
    if (directory / _SPLITS).exists():
        splits = ", ".join(sorted(path.parent.name for path in directory.glob(f"*/{_LIST}")))
        raise ValueError(f"{directory} has several splits ({splits}): name one of them, DIR/SPLIT")
    if not (directory / _LIST).exists():
        raise ValueError(
            f"{directory} is a directory, and not one that the datasets library saved: name its"
            " data files one by one"
        )
    try:
        names = [entry["filename"] for entry in _read_list(directory)]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / _LIST} does not list data files: {error}") from error
    if not names:
        raise ValueError(f"{directory} holds no rows")
    return [directory / name for name in names]


def _read_list(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / _LIST).read_text(encoding="utf-8"))["_data_files"]


def _line(row: dict[str, Any]) -> bytes:
    """A row as JSON; bytes that are not UTF-8 stay what they are (rows.py)."""
    text = json.dumps(row, default=_json, ensure_ascii=False)
    return text.encode("utf-8", "surrogateescape")


def _json(value: object) -> str:
    """What JSON cannot hold; bytes are text whose writer did not say that it is."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def _given(data: list[bytes], row: int, size: int) -> Iterator[Part]:
    if data:
        yield Part("lines", row, b"\n".join(data), size * len(data))


def _batches(path: Path, suffix: str, part: int) -> Generator[Any]:
    """Yields the number of rows, then the rows in record batches of some `part` bytes."""
    if suffix == PARQUET:
        parquet = library("pyarrow.parquet", EXTRA, path)
        with parquet.ParquetFile(path) as file:
            about = file.metadata
            yield about.num_rows
            groups = [about.row_group(i) for i in range(about.num_row_groups)]
            largest = max((g.total_byte_size / max(1, g.num_rows) for g in groups), default=1)
            yield from file.iter_batches(batch_size=_rows_at_once(part, largest))
        return
    ipc = library("pyarrow.ipc", EXTRA, path)
    with library("pyarrow", EXTRA, path).memory_map(str(path)) as file:
        # Two passes: a stream does not say at its head how many rows it has.
        yield sum(batch.num_rows for batch in _record_batches(ipc, file))
        for batch in _record_batches(ipc, file):
            step = _rows_at_once(part, batch.nbytes / max(1, batch.num_rows))
            yield from (batch.slice(at, step) for at in range(0, batch.num_rows, step))


def _record_batches(ipc: Any, file: Any) -> Iterator[Any]:
    """Those of a stream, as `datasets` writes it, or of a file of batches (Feather)."""
    file.seek(0)
    if file.read(len(_MAGIC)) == _MAGIC:
        reader = ipc.open_file(file)
        yield from map(reader.get_batch, range(reader.num_record_batches))
        return
    file.seek(0)
    yield from ipc.open_stream(file)


def _rows_at_once(part: int, size: float) -> int:
    return max(1, min(_ROWS, int(part / max(1, size))))
