"""Packing without regard for documents: all tokens in one stream, cut into rows.

"concat"
    Documents in random order, cut every `seq_len` tokens; every token is in one row, only the last
    row is not full. For pre-training text; a chat may be cut in two.
"xtuner"
    XTuner's Packer with one worker, for comparisons. Documents are first cut to their head of
    `seq_len` tokens. 1,000 documents at a time join the rest of those before; full rows are cut
    off, the new rest is carried on. A rest with less than one full row becomes a short row. The
    last rest is lost, here counted. The last token of a row has no target.

In both, positions restart at every document and at every row; documents never see each other.

References:
    InternLM/xtuner v0.1.23: xtuner/dataset/utils.py `Packer`, xtuner/dataset/huggingface.py.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int64

from train.data.pack.mixture import permutation
from train.data.pack.packing import PackedRows
from train.data.pack.spans import Spans, check_any, count_targets, problems, targets_of
from train.data.tokens.dataset import Dataset

Packing = Literal["fit", "concat", "xtuner"]

XTUNER_BATCH = 1000  # documents that its `map(Packer, batched=True)` hands over at once


def pack_stream(
    dataset: Dataset,
    seq_len: int,
    repeats: Int64[np.ndarray, " D"],
    *,
    method: Packing,
    seed: int,
) -> tuple[Spans, PackedRows]:
    """Split documents, each taken `repeats` times, into rows; raise ValueError if none is left."""
    lengths = dataset.lengths
    wanted = repeats > 0
    usable = wanted & (dataset.targets > 0)
    if method == "xtuner":
        for d in np.flatnonzero(usable & (lengths > seq_len)):
            begin = int(dataset.offsets[d])
            usable[d] = count_targets(dataset, int(d), begin, begin + seq_len, False) > 0
        lengths = np.minimum(lengths, seq_len)
    check_any(dataset, usable, seq_len, method)
    order = np.repeat(np.arange(len(usable)), np.where(usable, repeats, 0))
    order = order[permutation(len(order), seed)]
    edges = np.concatenate([[0], np.cumsum(lengths[order])])
    even = np.append(np.arange(0, edges[-1], seq_len), edges[-1])
    cuts = _xtuner_cuts(edges, seq_len) if method == "xtuner" else even
    if len(cuts) == 1:
        raise ValueError(
            f"XTuner's packing loses all {edges[-1]:,} tokens at {seq_len=}: choose another"
        )
    begins = np.unique(np.concatenate([edges, cuts]))
    begins = begins[begins < cuts[-1]]
    ends = np.append(begins[1:], cuts[-1])
    place = np.searchsorted(edges, begins, "right") - 1
    document = order[place]
    start = dataset.offsets[document] + begins - edges[place]
    length = ends - begins
    continues = (start + length < dataset.offsets[document + 1]) & (method == "concat")
    taken = np.bincount(document, minlength=len(usable)) > 0
    held = np.zeros(len(usable), np.int64)
    np.add.at(held, document, length)
    partial = taken & (held < dataset.lengths * repeats)
    return (
        Spans(
            start=start,
            length=length,
            continues=continues,
            targets=targets_of(dataset, document, start, length, continues),
            document=document,
            dropped=problems(dataset, usable & ~taken, "in the rest that XTuner loses")
            + problems(dataset, wanted & ~usable, "none is trained on"),
            truncated=problems(dataset, partial, f"cut as by {method}"),
        ),
        PackedRows(spans=np.arange(len(begins)), offsets=np.searchsorted(begins, cuts)),
    )


def _xtuner_cuts(edges: Int64[np.ndarray, " n"], seq_len: int) -> Int64[np.ndarray, " E"]:
    """Return the places in the stream where rows begin, and the end of the last one."""
    cuts = [0]
    for last in range(XTUNER_BATCH, len(edges) - 1 + XTUNER_BATCH, XTUNER_BATCH):
        end = int(edges[min(last, len(edges) - 1)])
        if end - cuts[-1] < seq_len:
            cuts.append(end)
        else:
            cuts += range(cuts[-1] + seq_len, end + 1, seq_len)
    return np.array(cuts, np.int64)
