"""Files to one long array of tokens, which may be far larger than the memory."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64
from tqdm import tqdm

from models.tokenizer import Tokenizer
from train.data.files.template import MissingTokens
from train.data.report import FileReport, Problem
from train.data.tokens.cache import ReadOptions, log_stale_caches, open_documents
from train.data.tokens.documents import Documents
from train.data.tokens.token_array import TokenArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """D tokenized documents, one after the other."""

    # the id of a token that is trained on, that is, whose prediction counts; `~id`, which is
    # negative, of another
    tokens: TokenArray
    offsets: Int64[np.ndarray, " E"]  # E = D + 1; document d is `tokens[offsets[d]:offsets[d + 1]]`
    targets: Int64[np.ndarray, " D"]  # trained tokens of each document, without its first token
    splittable: Bool[np.ndarray, " D"]  # true for raw text, false for a chat
    hashes: UInt64[np.ndarray, " D"]  # hash of each document's ids
    file: Int32[np.ndarray, " D"]  # index of the document's file in `files`
    line: Int64[np.ndarray, " D"]  # line of the file on which it begins
    files: tuple[FileReport, ...]  # counts for each file
    broken: tuple[Problem, ...]  # rows that could not be used
    vocab_size: int  # ids are below this
    digest: str  # hash of all tokens

    @property
    def lengths(self) -> Int64[np.ndarray, " D"]:
        """Tokens of each document."""
        return np.diff(self.offsets)


def tokenize(
    paths: Sequence[Path], tokenizer: Tokenizer, options: ReadOptions | None = None
) -> Dataset:
    """Read and tokenize files; show a progress bar if stderr is a terminal.

    Raises:
        ValueError: a file is missing, empty, of an unknown kind, or has no usable row; the
            tokenizer lacks the tokens of chats; a row is broken and `strict` is set. One line, with
            file and line.
        OSError: the cache cannot be written.
    """
    options = options or ReadOptions()
    if options.cache is not None:
        log_stale_caches(options.cache)
    size = sum(path.stat().st_size for path in paths if path.is_file())
    chunks: list[list[Documents]] = []
    files: list[FileReport] = []
    broken: list[Problem] = []
    with tqdm(total=size, desc="tokenize", unit="B", unit_scale=True, disable=None) as bar:
        for path in paths:
            try:
                chunks.append(open_documents(path, tokenizer, options, bar))
            except MissingTokens as error:
                raise ValueError(f"{path}: {error}") from error
            found = [Problem(str(path), *row) for chunk in chunks[-1] for row in chunk.broken]
            if options.strict and found:
                raise ValueError(str(found[0]))
            files.append(_file_report(path, chunks[-1], found))
            broken += found
    return _join(chunks, tuple(files), tuple(broken), tokenizer.vocab_size)


def _file_report(path: Path, chunks: list[Documents], broken: list[Problem]) -> FileReport:
    rows = sum(chunk.rows for chunk in chunks)
    if rows == 0:
        raise ValueError(f"{path} holds no rows")
    if rows == len(broken):
        hint = " (a .json file is an array of rows, or has one object a line)"
        hint = hint if "not JSON" in broken[0].reason else ""
        raise ValueError(
            f"{path}: none of its {rows:,} rows can be used; the first: {broken[0]}{hint}"
        )

    def total(name: str) -> dict[str, int]:
        return dict(sum((Counter(getattr(chunk, name)) for chunk in chunks), Counter()))

    return FileReport(
        file=str(path),
        rows=rows,
        documents=rows - len(broken),
        formats=total("formats"),
        unread=total("unread"),
        remarks=total("remarks"),
    )


def _join(
    files: list[list[Documents]],
    reports: tuple[FileReport, ...],
    broken: tuple[Problem, ...],
    vocab_size: int,
) -> Dataset:
    chunks = [chunk for file in files for chunk in file]
    counts = [sum(len(chunk.index) for chunk in file) for file in files]

    def column(name: str) -> np.ndarray:
        return np.concatenate([chunk.index[name] for chunk in chunks])

    digest = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        digest.update(bytes.fromhex(chunk.digest))
    return Dataset(
        tokens=TokenArray([chunk.tokens for chunk in chunks]),
        offsets=np.concatenate([[0], np.cumsum(column("length"), dtype=np.int64)]),
        targets=column("targets"),
        splittable=column("splittable"),
        hashes=column("hash"),
        file=np.repeat(np.arange(len(files), dtype=np.int32), counts),
        line=column("line"),
        files=reports,
        broken=broken,
        vocab_size=vocab_size,
        digest=digest.hexdigest(),
    )
