"""Which piece goes into which row, and what a row looks like.

1. `cut` (pieces.py) turns documents into pieces no longer than a row.
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
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Int64

from train.data.pack.order import shuffled
from train.data.pack.spans import Pieces
from train.data.tokens.dataset import Dataset

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
class Rows:
    """R = E - 1 rows of P pieces; row r holds `pieces[offsets[r]:offsets[r + 1]]`, in order."""

    pieces: Int64[np.ndarray, " P"]
    offsets: Int64[np.ndarray, " E"]

    def __len__(self) -> int:
        return len(self.offsets) - 1


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
    order = shuffled(len(lengths), seed)
    packed: list[Int64[np.ndarray, " n"]] = []
    counts: list[int] = []
    carried: list[int] = []
    for at in range(0, len(order), window):
        here = carried + order[at : at + window].tolist()
        rows, free = _best_fit(here, lengths, seq_len)
        carried = rows.pop(free[-1][1])
        packed.append(np.array([piece for row in rows for piece in row], np.int64))
        counts += map(len, rows)
    return Rows(
        pieces=np.concatenate([*packed, np.array(carried, np.int64)]),
        offsets=np.cumsum([0, *counts, len(carried)], dtype=np.int64),
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
            signed = dataset.tokens[start : start + targets + 1]
            tokens = np.where(signed < 0, ~signed, signed)
            batch.tokens[b, at : at + n] = tokens[:n]
            batch.targets[b, at : at + targets] = tokens[1:]
            batch.loss_mask[b, at : at + targets] = signed[1:] >= 0
            batch.segment_ids[b, at : at + n] = number
            batch.positions[b, at : at + n] = count[:n]
            at += n
    return batch


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
