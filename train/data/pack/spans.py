"""Documents to spans: the stretches of tokens that go into rows, and what is left out.

A span is one segment of one row. Raw text longer than a row is split into consecutive spans; a chat
never is: one that is too long is dropped or cut, as chosen, and counted.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64

from train.data.report import Problem
from train.data.tokens.dataset import Dataset

TooLong = Literal["drop", "head", "tail"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
    """P stretches of tokens, each of them one segment of one row."""

    start: Int64[np.ndarray, " P"]  # index of the first token in `Dataset.tokens`
    length: Int64[np.ndarray, " P"]  # tokens, 1..seq_len
    # true if its last token has a target, the next one of its document
    continues: Bool[np.ndarray, " P"]
    targets: Int64[np.ndarray, " P"]  # number of its targets that are trained on
    document: Int64[np.ndarray, " P"]  # index of its document
    dropped: tuple[Problem, ...]  # documents without a span, and why
    truncated: tuple[Problem, ...]  # documents that are not whole, and which part is kept

    def __len__(self) -> int:
        return len(self.start)


def split_documents(
    dataset: Dataset, seq_len: int, repeats: Int64[np.ndarray, " D"], *, too_long: TooLong = "drop"
) -> Spans:
    """Divide documents, each taken `repeats` times, into spans of at most `seq_len` tokens.

    Of a chat longer than a row, "drop" leaves out all, "head" keeps the first `seq_len` tokens (as
    XTuner does: the answer may lose its end), "tail" the last (the prompt may lose its beginning).
    Raw text is split and loses nothing.

    Raises:
        ValueError: no document is left.
    """
    wanted = repeats > 0
    begin, end = dataset.offsets[:-1].copy(), dataset.offsets[1:]
    cropped = wanted & ~dataset.splittable & (dataset.lengths > seq_len)
    if too_long == "tail":
        begin[cropped] = end[cropped] - seq_len
    stop = np.where(cropped & (too_long == "head"), begin + seq_len, end)
    dropped = cropped & (too_long == "drop")
    targets = dataset.targets.copy()
    for d in np.flatnonzero(cropped & ~dropped):
        targets[d] = _count_trained(dataset, int(begin[d]), int(stop[d]), bool(stop[d] < end[d]))
    untrained = wanted & ~dropped & (targets == 0)
    kept = wanted & ~untrained & ~dropped
    check_any(dataset, kept, seq_len, too_long)

    counts = np.where(kept, -(-(stop - begin) // seq_len), 0)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = begin[document] + number * seq_len
    length = np.minimum(stop[document] - start, seq_len)
    continues = start + length < end[document]
    found = targets_of(dataset, document, start, length, continues)
    start, length, continues, found, document = (
        np.repeat(column, repeats[document])
        for column in (start, length, continues, found, document)
    )
    return Spans(
        start=start,
        length=length,
        continues=continues,
        targets=found,
        document=document,
        dropped=problems(dataset, dropped, f"a row has {seq_len:,}")
        + problems(dataset, untrained, "none is trained on"),
        truncated=problems(dataset, cropped & kept, f"the {too_long} is kept"),
    )


def targets_of(
    dataset: Dataset,
    document: Int64[np.ndarray, " P"],
    start: Int64[np.ndarray, " P"],
    length: Int64[np.ndarray, " P"],
    continues: Bool[np.ndarray, " P"],
) -> Int64[np.ndarray, " P"]:
    """Return the number of trained targets of each span; they are counted in parts of documents."""
    targets = dataset.targets[document]
    for p in np.flatnonzero(length < dataset.lengths[document]):
        first, last = int(start[p]), int(start[p] + length[p])
        targets[p] = count_targets(dataset, int(document[p]), first, last, bool(continues[p]))
    return targets


def count_targets(dataset: Dataset, document: int, start: int, stop: int, continues: bool) -> int:
    """Return the number of trained targets of the stretch start..stop of a document.

    A document of which every token is trained on (raw text) is not read.
    """
    begin, end = dataset.offsets[document], dataset.offsets[document + 1]
    if dataset.targets[document] == end - begin - 1:
        return stop - start - 1 + continues
    return _count_trained(dataset, start, stop, continues)


def _count_trained(dataset: Dataset, start: int, stop: int, continues: bool) -> int:
    return int((dataset.tokens[start + 1 : stop + continues] >= 0).sum())


def check_any(dataset: Dataset, kept: Bool[np.ndarray, " D"], seq_len: int, how: str) -> None:
    """Raise ValueError if no document is left to train on."""
    if not kept.any():
        longest = int(dataset.lengths.max())
        if longest <= seq_len:
            raise ValueError(f"none of the {len(kept):,} documents has a token that is trained on")
        raise ValueError(
            f"none of the {len(kept):,} documents can be trained on at {seq_len=}: the longest has"
            f" {longest:,} tokens and over-long ones are treated with {how!r}; raise seq_len"
        )


def problems(
    dataset: Dataset, documents: Bool[np.ndarray, " D"], reason: str
) -> tuple[Problem, ...]:
    """Return file, line and length of each chosen document with a reason."""
    found, lengths = [], dataset.lengths
    for d in np.flatnonzero(documents):
        file, line = dataset.files[dataset.file[d]].file, int(dataset.line[d])
        found.append(Problem(file, line, 0, f"{lengths[d]:,} tokens, {reason}"))
    return tuple(found)
