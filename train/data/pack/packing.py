"""Packing: spans to rows, and rows to arrays.

1. `split_documents` (spans.py) turns documents into spans no longer than a row.
2. `pack` puts whole spans into rows: best-fit decreasing within a bounded window of spans.
3. `fill` writes rows out. A token's target is the next token of its *document*, looked up before
   the split: the target of a span's last token is the first token of the next span; only the last
   token of a document has none.

The spans of a window's emptiest row are packed again with the next window, and the last window is
written out whole, so that nothing is lost. Best-fit decreasing puts documents of similar length
into a row; the order of rows is therefore shuffled anew in every epoch (loader.py).
"""

import bisect
import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Int64, Integer

from train.data.pack.mixture import permutation
from train.data.pack.spans import Spans
from train.data.tokens.dataset import Dataset

WINDOW = 16_384  # spans that are sorted together: 2.9 M tokens of Alpaca, 87 rows of 32,768


class Batch(NamedTuple):
    """B packed rows of T tokens; NumPy arrays from the loader, JAX arrays in the step.

    Attributes:
        tokens: int32 ids; the padding id in the padding.
        targets: int32, the next token of the same document; the padding id if there is none.
        loss_mask: float32, 1 if predicting the target counts, else 0.
        segment_ids: int32, 1.. in order of place within each row; 0 = padding.
        positions: int32, from 0 in every segment; 0 in the padding.
        sources: index of the training file that the document is from; None: there is one.
    """

    tokens: Int32[np.ndarray | Array, "B T"]
    targets: Int32[np.ndarray | Array, "B T"]
    loss_mask: Float32[np.ndarray | Array, "B T"]
    segment_ids: Int32[np.ndarray | Array, "B T"]
    positions: Int32[np.ndarray | Array, "B T"]
    sources: Integer[np.ndarray | Array, "B T"] | None = None


def source_dtype(count: int) -> np.dtype | None:
    """Return the dtype of `Batch.sources`, one byte up to 256 sources; None for one source."""
    return None if count == 1 else np.min_scalar_type(count - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRows:
    """R = E - 1 rows of P spans; row r has `spans[offsets[r]:offsets[r + 1]]`, in order."""

    spans: Int64[np.ndarray, " P"]
    offsets: Int64[np.ndarray, " E"]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack(
    lengths: Int64[np.ndarray, " P"], seq_len: int, *, seed: int, window: int = WINDOW
) -> PackedRows:
    """Put every span into exactly one row, whole.

    Spans of 1..seq_len tokens are shuffled, and `window` of them at a time are placed longest
    first, each into the fullest row that has room for it (best-fit decreasing). The arguments
    determine the result. Time: O(P log P); memory beyond the result: one window.
    """
    order = permutation(len(lengths), seed)
    packed: list[Int64[np.ndarray, " n"]] = []
    counts: list[int] = []
    carried: list[int] = []
    for at in range(0, len(order), window):
        here = carried + order[at : at + window].tolist()
        rows, free = _best_fit(here, lengths, seq_len)
        carried = rows.pop(free[-1][1])
        packed.append(np.array([span for row in rows for span in row], np.int64))
        counts += map(len, rows)
    return PackedRows(
        spans=np.concatenate([*packed, np.array(carried, np.int64)]),
        offsets=np.cumsum([0, *counts, len(carried)], dtype=np.int64),
    )


def fill(
    dataset: Dataset,
    spans: Spans,
    rows: PackedRows,
    chosen: Int[np.ndarray, " B"],
    *,
    seq_len: int,
    pad_id: int,
    sources: Integer[np.ndarray, " D"] | None = None,
) -> Batch:
    """Write out the rows numbered `chosen`, as NumPy arrays [B, T].

    `rows` are lists of `spans`, which are parts of documents. Rows are filled up to `seq_len` with
    `pad_id`. `sources` has the index of each document's source, in the dtype of the batch; None:
    one source.

    Raises:
        ValueError: the token cache holds ids that the tokenizer does not have.
    """
    shape = (len(chosen), seq_len)
    # `~id`, as in the dataset, for an id that is not trained on: so is the padding.
    tokens = np.full(shape, ~pad_id, np.int32)
    targets = np.full(shape, ~pad_id, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    source_ids = None if sources is None else np.zeros(shape, sources.dtype)
    for b, row in enumerate(chosen):
        segments = rows.spans[rows.offsets[row] : rows.offsets[row + 1]]
        lengths = spans.length[segments]
        ends = np.cumsum(lengths)
        at = 0
        columns = (spans.start[segments], lengths, spans.continues[segments])
        for start, n, continues in zip(*(column.tolist() for column in columns), strict=True):
            count = n if continues else n - 1
            signed = dataset.tokens[start : start + count + 1]
            tokens[b, at : at + n] = signed[:n]
            targets[b, at : at + count] = signed[1:]
            at += n
        segment_ids[b, :at] = np.repeat(np.arange(1, len(segments) + 1), lengths)
        positions[b, :at] = np.arange(at) - np.repeat(ends - lengths, lengths)
        if sources is not None and source_ids is not None:
            source_ids[b, :at] = np.repeat(sources[spans.document[segments]], lengths)
    batch = Batch(
        tokens=np.where(tokens < 0, ~tokens, tokens),
        targets=np.where(targets < 0, ~targets, targets),
        loss_mask=(targets >= 0).astype(np.float32),
        segment_ids=segment_ids,
        positions=positions,
        sources=source_ids,
    )
    largest = max(batch.tokens.max(), batch.targets.max())
    if largest >= dataset.vocab_size:
        raise ValueError(
            f"the token cache holds id {largest:,}, and the tokenizer has {dataset.vocab_size:,}"
            " ids: the cache was changed while it was used; start again, and it is made anew"
        )
    return batch


def _best_fit(
    spans: list[int], lengths: Int64[np.ndarray, " P"], seq_len: int
) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Return the rows, and (free tokens, row) of each in increasing order."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    sizes = lengths[spans]
    for index in np.argsort(-sizes, kind="stable"):
        size = int(sizes[index])
        fit = bisect.bisect_left(free, (size, -1))
        if fit == len(free):
            space, row = seq_len, len(rows)
            rows.append([])
        else:
            space, row = free.pop(fit)
        rows[row].append(spans[index])
        bisect.insort(free, (space - size, row))
    return rows, free
