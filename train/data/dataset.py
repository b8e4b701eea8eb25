"""Files to one long array of tokens: read, recognise, tokenise, count what is broken.

The result does not depend on the sequence length: what a row can hold is packing.py's part.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64
from tqdm import tqdm

from models.tokenizer import Tokenizer
from train.data.formats import Chat, RowError, Text, recognise
from train.data.report import FileReport, Problem
from train.data.source import Broken, Row, read_rows
from train.data.template import Encoded, encode

_CHUNK = 1 << 20  # bytes of rows tokenised at once: enough for every core, little memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """D tokenised documents of N tokens together, one after the other.

    Attributes:
        tokens: int32 ids.
        trained: bool, whether predicting this token counts (template.Encoded).
        offsets: int64, E = D + 1; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        splittable: bool, true for raw text, false for a chat.
        file: int32, index of the document's file in `files`.
        line: int64, line of the file on which it begins.
        files: what was read.
        broken: rows that could not be used.
    """

    tokens: Int32[np.ndarray, " N"]
    trained: Bool[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " E"]
    splittable: Bool[np.ndarray, " D"]
    file: Int32[np.ndarray, " D"]
    line: Int64[np.ndarray, " D"]
    files: tuple[FileReport, ...]
    broken: tuple[Problem, ...]

    @property
    def lengths(self) -> Int64[np.ndarray, " D"]:
        """Tokens of each document."""
        return np.diff(self.offsets)


def tokenise(paths: Sequence[Path], tokenizer: Tokenizer, *, strict: bool = False) -> Dataset:
    """Reads and tokenises files; shows a progress bar where stderr is a terminal.

    Args:
        paths: the files, in this order.
        tokenizer: makes the ids.
        strict: the first broken row is fatal.

    Raises:
        ValueError: a file is missing, empty, of an unknown kind, or has no usable row; a row is
            broken and `strict` is set. One line, with file and line.
    """
    size = sum(path.stat().st_size for path in paths if path.exists())
    with tqdm(total=size, desc="tokenise", unit="B", unit_scale=True, disable=None) as bar:
        return _join([_tokenise_file(path, tokenizer, strict, bar) for path in paths])


def _tokenise_file(path: Path, tokenizer: Tokenizer, strict: bool, bar: tqdm) -> Dataset:
    documents: list[Encoded] = []
    splittable: list[bool] = []
    lines: list[int] = []
    formats: Counter[str] = Counter()
    broken: list[Problem] = []

    def skip(line: int, reason: str) -> None:
        broken.append(Problem(str(path), line, reason))
        if strict:
            raise ValueError(str(broken[-1]))

    for rows in _chunks(read_rows(path)):
        usable: list[tuple[int, str, Text | Chat]] = []
        for row in rows:
            try:
                usable.append((row.line, *recognise(_value(row))))
            except RowError as error:
                skip(row.line, str(error))
        encoded = encode([sample for _, _, sample in usable], tokenizer)
        for (line, name, sample), document in zip(usable, encoded, strict=True):
            if len(document.tokens) < 2:
                skip(line, "the text has no tokens")
                continue
            documents.append(document)
            splittable.append(isinstance(sample, Text))
            lines.append(line)
            formats[name] += 1
        bar.update(sum(row.size for row in rows))

    count = len(documents) + len(broken)
    if count == 0:
        raise ValueError(f"{path} holds no rows")
    if not documents:
        raise ValueError(f"{path}: none of its {count:,} rows can be used; the first: {broken[0]}")
    return Dataset(
        tokens=np.concatenate([document.tokens for document in documents]),
        trained=np.concatenate([document.trained for document in documents]),
        offsets=_offsets([len(document.tokens) for document in documents]),
        splittable=np.array(splittable),
        file=np.zeros(len(documents), np.int32),
        line=np.array(lines, np.int64),
        files=(FileReport(str(path), dict(formats), count, len(documents)),),
        broken=tuple(broken),
    )


def _chunks(rows: Iterable[Row | Broken]) -> Iterator[list[Row | Broken]]:
    """Groups rows into what is tokenised at once."""
    chunk: list[Row | Broken] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.size
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _value(row: Row | Broken) -> object:
    if isinstance(row, Broken):
        raise RowError(row.reason)
    return row.value


def _join(parts: list[Dataset]) -> Dataset:
    return Dataset(
        tokens=np.concatenate([part.tokens for part in parts]),
        trained=np.concatenate([part.trained for part in parts]),
        offsets=_offsets(np.concatenate([part.lengths for part in parts])),
        splittable=np.concatenate([part.splittable for part in parts]),
        file=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.line) for part in parts]),
        line=np.concatenate([part.line for part in parts]),
        files=tuple(file for part in parts for file in part.files),
        broken=tuple(problem for part in parts for problem in part.broken),
    )


def _offsets(lengths: Sequence[int] | Int64[np.ndarray, " D"]) -> Int64[np.ndarray, " E"]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
