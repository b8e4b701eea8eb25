"""Files to one long sequence of tokens, which may be far larger than the memory."""

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64
from tqdm import tqdm

from models.tokenizer import Tokenizer
from train.data.report import FileReport, Problem
from train.data.tokens.cache import open_documents
from train.data.tokens.documents import Documents
from train.data.tokens.token_array import Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """D tokenised documents, one after the other.

    Attributes:
        tokens: int32 ids where the token is trained on, that is where predicting it counts;
            `~id`, which is negative, where it is not.
        offsets: int64, E = D + 1; document d is `tokens[offsets[d]:offsets[d + 1]]`.
        targets: int64, tokens of each document that are trained on, the first one not counted.
        splittable: bool, true for raw text, false for a chat.
        file: int32, index of the document's file in `files`.
        line: int64, line of the file on which it begins.
        files: what was read.
        broken: rows that could not be used.
        digest: hash of all tokens.
    """

    tokens: Tokens
    offsets: Int64[np.ndarray, " E"]
    targets: Int64[np.ndarray, " D"]
    splittable: Bool[np.ndarray, " D"]
    file: Int32[np.ndarray, " D"]
    line: Int64[np.ndarray, " D"]
    files: tuple[FileReport, ...]
    broken: tuple[Problem, ...]
    digest: str

    @property
    def lengths(self) -> Int64[np.ndarray, " D"]:
        """Tokens of each document."""
        return np.diff(self.offsets)


def tokenise(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    strict: bool = False,
    cache: Path | None = None,
    workers: int | None = None,
) -> Dataset:
    """Reads and tokenises files; shows a progress bar where stderr is a terminal.

    Args:
        paths: the files, in this order.
        tokenizer: makes the ids.
        strict: the first broken row is fatal.
        cache: directory that keeps the tokens (cache.py); None: the memory does.
        workers: processes that fill the cache; by default one a core. The result is the same.

    Raises:
        ValueError: a file is missing, empty, of an unknown kind, or has no usable row; a row is
            broken and `strict` is set. One line, with file and line.
        OSError: the cache cannot be written.
    """
    workers = workers or len(os.sched_getaffinity(0))
    size = sum(path.stat().st_size for path in paths if path.is_file())
    parts: list[list[Documents]] = []
    files: list[FileReport] = []
    broken: list[Problem] = []
    with tqdm(total=size, desc="tokenise", unit="B", unit_scale=True, disable=None) as bar:
        for path in paths:
            parts.append(open_documents(path, tokenizer, cache=cache, workers=workers, bar=bar))
            found = [
                Problem(str(path), line, reason) for p in parts[-1] for line, reason in p.broken
            ]
            if strict and found:
                raise ValueError(str(found[0]))
            files.append(_file_report(path, parts[-1], found))
            broken += found
    return _join(parts, tuple(files), tuple(broken))


def _file_report(path: Path, parts: list[Documents], broken: list[Problem]) -> FileReport:
    rows = sum(part.rows for part in parts)
    if rows == 0:
        raise ValueError(f"{path} holds no rows")
    if rows == len(broken):
        hint = " (a .json file is an array of rows, or has one object a line)"
        hint = hint if "not JSON" in broken[0].reason else ""
        raise ValueError(
            f"{path}: none of its {rows:,} rows can be used; the first: {broken[0]}{hint}"
        )
    formats = sum((Counter(part.formats) for part in parts), Counter())
    return FileReport(str(path), dict(formats), rows, rows - len(broken))


def _join(
    files: list[list[Documents]], reports: tuple[FileReport, ...], broken: tuple[Problem, ...]
) -> Dataset:
    parts = [part for file in files for part in file]
    counts = [sum(len(part.index) for part in file) for file in files]

    def column(name: str) -> np.ndarray:
        return np.concatenate([part.index[name] for part in parts])

    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(bytes.fromhex(part.digest))
    return Dataset(
        tokens=Tokens([part.tokens for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(column("length"), dtype=np.int64)]),
        targets=column("targets"),
        splittable=column("splittable"),
        file=np.repeat(np.arange(len(files), dtype=np.int32), counts),
        line=column("line"),
        files=reports,
        broken=broken,
        digest=digest.hexdigest(),
    )
