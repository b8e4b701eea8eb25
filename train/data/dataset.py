"""Files to one long array of tokens: read, recognise, tokenise, count what is broken.

The result does not depend on the sequence length: what a row can hold is packing.py's part.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64
from tqdm import tqdm

from train.data.formats import RowError, Text, recognise
from train.data.report import FileReport, Problem
from train.data.source import Broken, Row, read_rows
from train.data.template import Encoded, Tokenizer, encode


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
    documents: list[Encoded] = []
    splittable: list[bool] = []
    lines: list[int] = []
    files: list[FileReport] = []
    broken: list[Problem] = []
    size = sum(path.stat().st_size for path in paths if path.exists())
    with tqdm(total=size, desc="tokenise", unit="B", unit_scale=True, disable=None) as bar:
        for path in paths:
            problems: list[Problem] = []
            formats: Counter[str] = Counter()
            for row in read_rows(path):
                try:
                    name, sample = recognise(_value(row))
                    documents.append(encode(sample, tokenizer))
                except RowError as error:
                    problems.append(Problem(str(path), row.line, str(error)))
                    if strict:
                        raise ValueError(str(problems[-1])) from error
                else:
                    formats[name] += 1
                    splittable.append(isinstance(sample, Text))
                    lines.append(row.line)
                bar.update(row.size)
            files.append(_file_report(path, formats, problems))
            broken += problems
    counts = [file.documents for file in files]
    return Dataset(
        tokens=np.concatenate([document.tokens for document in documents]),
        trained=np.concatenate([document.trained for document in documents]),
        offsets=np.cumsum([0] + [len(document.tokens) for document in documents], dtype=np.int64),
        splittable=np.array(splittable),
        file=np.repeat(np.arange(len(files), dtype=np.int32), counts),
        line=np.array(lines, np.int64),
        files=tuple(files),
        broken=tuple(broken),
    )


def _value(row: Row | Broken) -> object:
    if isinstance(row, Broken):
        raise RowError(row.reason)
    return row.value


def _file_report(path: Path, formats: Counter[str], problems: list[Problem]) -> FileReport:
    documents = formats.total()
    rows = documents + len(problems)
    if rows == 0:
        raise ValueError(f"{path} holds no rows")
    if documents == 0:
        raise ValueError(f"{path}: none of its {rows:,} rows can be used; the first: {problems[0]}")
    return FileReport(str(path), dict(formats), rows, documents)
