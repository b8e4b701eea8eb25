"""Which tokens go into which row: documents to pieces, pieces to rows of `seq_len` places.

1. `cut` turns documents into pieces no longer than a row. A raw text is split into consecutive
   pieces; a chat never is: one that is too long is dropped or cut, as chosen, and counted.
2. `pack` puts whole pieces into rows: best-fit decreasing within a bounded window of pieces.
3. `fill` writes rows out. A token's target is the next token of its *document*, looked up
   before anything was cut: the last token of a piece has the first one of the next piece as
   its target; only the last token of a document has none.

Nothing is lost between windows or at the end: the emptiest row of a window is taken apart and
packed with the next one, and the last window is flushed whole.

What best-fit decreasing costs: rows hold documents of similar length, since the long ones are
placed first. The order of rows is therefore shuffled anew in every epoch (loader.py).
"""

import bisect
import dataclasses
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, Int64

from train.data.dataset import Dataset
from train.data.order import shuffled
from train.data.report import Problem

Overlong = Literal["drop", "head", "tail"]

WINDOW = 16_384  # pieces that are sorted together: 2.9 M tokens of Alpaca, 87 rows of 32,768


class Batch(NamedTuple):
    """B packed rows of T places; numpy arrays from the loader, jax arrays in the step.

    Attributes:
        tokens: int32 ids; the padding id where there is nothing.
        targets: int32, the next token of the same document; the padding id where there is none.
        loss_mask: float32, 1 where predicting the target counts, else 0.
        segment_ids: int32, 1.. in order of place within each row; 0 = padding.
        positions: int32, from 0 in every piece; 0 in the padding.
    """

    tokens: Int32[np.ndarray | Array, "B T"]
    targets: Int32[np.ndarray | Array, "B T"]
    loss_mask: Float32[np.ndarray | Array, "B T"]
    segment_ids: Int32[np.ndarray | Array, "B T"]
    positions: Int32[np.ndarray | Array, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """P stretches of tokens, each to stand in one row as one segment.

    Attributes:
        start: int64, index of the first token in `Dataset.tokens`.
        length: int64, tokens, 1..seq_len.
        continues: bool, whether the document goes on after it, so that its last token has a
            target.
        document: int64, index of its document.
        dropped: documents that became no piece, and why.
        truncated: documents cut to a row, and how.
    """

    start: Int64[np.ndarray, " P"]
    length: Int64[np.ndarray, " P"]
    continues: Bool[np.ndarray, " P"]
    document: Int64[np.ndarray, " P"]
    dropped: tuple[Problem, ...]
    truncated: tuple[Problem, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """R = E - 1 rows of P pieces; row r holds `pieces[offsets[r]:offsets[r + 1]]`, in order."""

    pieces: Int64[np.ndarray, " P"]
    offsets: Int64[np.ndarray, " E"]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def cut(dataset: Dataset, seq_len: int, *, overlong: Overlong = "drop") -> Pieces:
    """Divides documents into pieces of at most `seq_len` tokens.

    Args:
        dataset: the documents.
        seq_len: places of a row.
        overlong: what becomes of a chat longer than a row: "drop" leaves it out, "head" keeps
            its first `seq_len` tokens (as XTuner does: the answer may lose its end), "tail" its
            last (the prompt may lose its beginning). Raw text is split and loses nothing.

    Raises:
        ValueError: no document is left.
    """
    begin, end = dataset.offsets[:-1].copy(), dataset.offsets[1:].copy()
    cropped = ~dataset.splittable & (dataset.lengths > seq_len)
    if overlong == "tail":
        begin[cropped] = end[cropped] - seq_len
    stop = np.where(cropped & (overlong == "head"), begin + seq_len, end)
    too_long = cropped & (overlong == "drop")
    untrained = ~too_long & (_count_targets(dataset, begin, stop, stop < end) == 0)
    kept = ~untrained & ~too_long
    if not kept.any():
        longest = int(dataset.lengths.max())
        raise ValueError(
            f"none of the {len(kept):,} documents can be trained on at {seq_len=}: the longest has"
            f" {longest:,} tokens and over-long ones are treated with {overlong!r}; raise seq_len"
        )

    counts = np.where(kept, -(-(stop - begin) // seq_len), 0)
    document = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = begin[document] + number * seq_len
    length = np.minimum(stop[document] - start, seq_len)

    return Pieces(
        start=start,
        length=length,
        continues=start + length < end[document],
        document=document,
        dropped=tuple(
            [_problem(dataset, d, f"a row has {seq_len:,}") for d in np.flatnonzero(too_long)]
            + [_problem(dataset, d, "none is trained on") for d in np.flatnonzero(untrained)]
        ),
        truncated=tuple(
            _problem(dataset, d, f"the {overlong} is kept") for d in np.flatnonzero(cropped & kept)
        ),
    )


def pack(
    lengths: Int64[np.ndarray, " P"], seq_len: int, *, seed: int, window: int = WINDOW
) -> Rows:
    """Puts every piece into exactly one row, whole.

    Pieces are shuffled, and `window` of them at a time are placed longest first, each into the
    fullest row that has room for it (best-fit decreasing). Deterministic given the arguments.
    Time: O(P log P); memory beyond the result: one window.

    Args:
        lengths: tokens of each piece, 1..seq_len.
        seq_len: places of a row.
        seed: of the shuffle.
        window: pieces placed together.
    """
    order = shuffled(len(lengths), seed).tolist()
    rows: list[list[int]] = []
    carried: list[int] = []
    for at in range(0, len(order), window):
        placed, free = _best_fit(carried + order[at : at + window], lengths, seq_len)
        emptiest = free[-1][1]
        carried = placed.pop(emptiest)
        rows += placed
    rows.append(carried)
    return Rows(
        pieces=np.array([piece for row in rows for piece in row], np.int64),
        offsets=np.cumsum([0] + [len(row) for row in rows], dtype=np.int64),
    )


def fill(
    dataset: Dataset,
    pieces: Pieces,
    rows: Rows,
    which: Int[np.ndarray, " B"],
    *,
    seq_len: int,
    pad_id: int,
) -> Batch:
    """Writes out the rows numbered `which`, as numpy arrays."""
    shape = (len(which), seq_len)
    batch = Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        loss_mask=np.zeros(shape, np.float32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    count = np.arange(seq_len, dtype=np.int32)
    for b, row in enumerate(which):
        at = 0
        segment = rows.pieces[rows.offsets[row] : rows.offsets[row + 1]]
        for number, piece in enumerate(segment, start=1):
            start, n = int(pieces.start[piece]), int(pieces.length[piece])
            targets = n if pieces.continues[piece] else n - 1
            following = slice(start + 1, start + 1 + targets)
            batch.tokens[b, at : at + n] = dataset.tokens[start : start + n]
            batch.targets[b, at : at + targets] = dataset.tokens[following]
            batch.loss_mask[b, at : at + targets] = dataset.trained[following]
            batch.segment_ids[b, at : at + n] = number
            batch.positions[b, at : at + n] = count[:n]
            at += n
    return batch


def count_loss_tokens(dataset: Dataset, pieces: Pieces) -> int:
    """Returns the sum of the loss mask over all rows."""
    stop = pieces.start + pieces.length
    return int(_count_targets(dataset, pieces.start, stop, pieces.continues).sum())


def _problem(dataset: Dataset, document: np.integer, reason: str) -> Problem:
    file = dataset.files[dataset.file[document]].file
    length = int(dataset.lengths[document])
    return Problem(file, int(dataset.line[document]), f"{length:,} tokens, {reason}")


def _best_fit(
    pieces: list[int], lengths: Int64[np.ndarray, " P"], seq_len: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Returns the rows, and (free places, row) of each in increasing order."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    sizes = lengths[pieces]
    for index in np.argsort(-sizes, kind="stable"):
        size = int(sizes[index])
        fit = bisect.bisect_left(free, (size, -1))
        if fit == len(free):
            space, row = seq_len, len(rows)
            rows.append([])
        else:
            space, row = free.pop(fit)
        rows[row].append(pieces[index])
        bisect.insort(free, (space - size, row))
    return rows, free


def _count_targets(
    dataset: Dataset,
    start: Int64[np.ndarray, " P"],
    stop: Int64[np.ndarray, " P"],
    continues: Bool[np.ndarray, " P"],
) -> Int64[np.ndarray, " P"]:
    """Returns how many trained targets the stretches start..stop have."""
    before = np.concatenate([[0], np.cumsum(dataset.trained, dtype=np.int64)])
    return before[stop + continues] - before[start + 1]
