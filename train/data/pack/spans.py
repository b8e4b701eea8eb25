"""Documents to pieces: which stretches of tokens go into rows, and what is left out.

A piece stands in one row as one segment. Raw text longer than a row is split into consecutive
pieces; a chat never is: one that is too long is dropped or cut, as chosen, and counted.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from train.data.report import Problem
from train.data.tokens.dataset import Dataset

TooLong = Literal["drop", "head", "tail"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """P stretches of tokens, each to stand in one row as one segment.

    Attributes:
        start: int64, index of the first token in `Dataset.tokens`.
        length: int64, tokens, 1..seq_len.
        continues: bool, whether its last token has a target, the next one of its document.
        targets: int64, how many of its targets are trained on.
        document: int64, index of its document.
        dropped: documents that became no piece, and why.
        truncated: documents of which a part became no piece, and which.
    """

    start: Int64[np.ndarray, " P"]
    length: Int64[np.ndarray, " P"]
    continues: Bool[np.ndarray, " P"]
    targets: Int64[np.ndarray, " P"]
    document: Int64[np.ndarray, " P"]
    dropped: tuple[Problem, ...]
    truncated: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.start)


def cut(
    dataset: Dataset,
    seq_len: int,
    *,
    too_long: TooLong = "drop",
    times: Int64[np.ndarray, " D"] | None = None,
) -> Pieces:
    """Divides documents into pieces of at most `seq_len` tokens.

    Args:
        dataset: the documents.
        seq_len: places of a row.
        too_long: what becomes of a chat longer than a row: "drop" leaves it out, "head" keeps
            its first `seq_len` tokens (as XTuner does: the answer may lose its end), "tail" its
            last (the prompt may lose its beginning). Raw text is split and loses nothing.
        times: how often each document is taken; by default once.

    Raises:
        ValueError: no document is left.
    """
    begin, end = dataset.offsets[:-1].copy(), dataset.offsets[1:]
    cropped = ~dataset.splittable & (dataset.lengths > seq_len)
    if times is not None:
        cropped &= times > 0
    if too_long == "tail":
        begin[cropped] = end[cropped] - seq_len
    stop = np.where(cropped & (too_long == "head"), begin + seq_len, end)
    dropped = cropped & (too_long == "drop")
    targets = dataset.targets.copy()
    for d in np.flatnonzero(cropped & ~dropped):
        targets[d] = count_targets(dataset, int(begin[d]), int(stop[d]), bool(stop[d] < end[d]))
    untrained = ~dropped & (targets == 0)
    if times is not None:
        untrained &= times > 0
    kept = ~untrained & ~dropped
    counts = np.where(kept, -(-(stop - begin) // seq_len), 0)
    if times is not None:
        counts = np.where(times > 0, counts, 0)
    check_any(dataset, kept & (counts > 0), seq_len, too_long)

    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = begin[document] + number * seq_len
    length = np.minimum(stop[document] - start, seq_len)
    continues = start + length < end[document]
    found = targets[document]
    for p in np.flatnonzero(counts[document] > 1):
        first, last = int(start[p]), int(start[p] + length[p])
        found[p] = count_split(dataset, int(document[p]), first, last, bool(continues[p]))
    columns = (start, length, continues, found, document)
    if times is not None and times.max() > 1:
        columns = tuple(np.repeat(column, times[document]) for column in columns)
    return Pieces(
        **dict(zip(("start", "length", "continues", "targets", "document"), columns, strict=True)),
        dropped=tuple(
            [problem(dataset, d, f"a row has {seq_len:,}") for d in np.flatnonzero(dropped)]
            + [problem(dataset, d, "none is trained on") for d in np.flatnonzero(untrained)]
        ),
        truncated=tuple(
            problem(dataset, d, f"the {too_long} is kept") for d in np.flatnonzero(cropped & kept)
        ),
    )


def count_targets(dataset: Dataset, start: int, stop: int, continues: bool) -> int:
    """Returns how many targets of the stretch start..stop are trained on."""
    return int((dataset.tokens[start + 1 : stop + continues] >= 0).sum())


def count_split(dataset: Dataset, document: int, start: int, stop: int, continues: bool) -> int:
    """The same, without reading a document of which every token is trained on (raw text)."""
    begin, end = dataset.offsets[document], dataset.offsets[document + 1]
    if dataset.targets[document] == end - begin - 1:
        return stop - start - 1 + continues
    return count_targets(dataset, start, stop, continues)


def check_any(dataset: Dataset, kept: Bool[np.ndarray, " D"], seq_len: int, how: str) -> None:
    """Raises ValueError if no document is left to train on."""
    if not kept.any():
        longest = int(dataset.lengths.max())
        if longest <= seq_len:
            raise ValueError(f"none of the {len(kept):,} documents has a token that is trained on")
        raise ValueError(
            f"none of the {len(kept):,} documents can be trained on at {seq_len=}: the longest has"
            f" {longest:,} tokens and over-long ones are treated with {how!r}; raise seq_len"
        )


def problem(dataset: Dataset, document: int | np.integer, reason: str) -> Problem:
    """Names a document and its length."""
    file = dataset.files[dataset.file[document]].file
    length = int(dataset.offsets[document + 1] - dataset.offsets[document])
    return Problem(file, int(dataset.line[document]), f"{length:,} tokens, {reason}")
