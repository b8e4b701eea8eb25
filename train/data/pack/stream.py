"""Packing without regard for documents: all tokens in one stream, cut into rows.

"concat"
    Documents in random order, cut every `seq_len` tokens; every token is in one row, only the last
    row is not full. For pre-training text; a chat may be cut in two.
"xtuner"
    XTuner's Packer with one worker, for comparisons. Documents are first cut to their head of
    `seq_len` tokens. 1,000 documents at a time join what is left of those before; full rows are
    cut off, the rest is carried on. Where there is not one full row, what there is becomes a short
    row. The last rest is lost, here counted. The last token of a row has no target.

In both, positions restart where a document does and where a row does; documents never see each
other.

References:
    InternLM/xtuner v0.1.23: xtuner/dataset/utils.py `Packer`, xtuner/dataset/huggingface.py.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int64

from train.data.pack.order import shuffled
from train.data.pack.packing import Rows
from train.data.pack.spans import Pieces, check_any, count_split, problem
from train.data.tokens.dataset import Dataset

Stream = Literal["concat", "xtuner"]

XTUNER_BATCH = 1000  # documents that its `map(Packer, batched=True)` hands over at once


def stream(
    dataset: Dataset,
    seq_len: int,
    *,
    how: Stream,
    seed: int,
    times: Int64[np.ndarray, " D"] | None = None,
) -> tuple[Pieces, Rows]:
    """Cuts documents and puts them into rows, both at once.

    Args:
        dataset: the documents.
        seq_len: places of a row.
        how: see above.
        seed: of the order of the documents.
        times: how often each document is taken; by default once.

    Raises:
        ValueError: no document is left.
    """
    wanted = np.ones(len(dataset.targets), np.int64) if times is None else times
    lengths = dataset.lengths
    usable = dataset.targets > 0
    if how == "xtuner":
        for d in np.flatnonzero(usable & (lengths > seq_len) & (wanted > 0)):
            begin = int(dataset.offsets[d])
            usable[d] = count_split(dataset, int(d), begin, begin + seq_len, False) > 0
        lengths = np.minimum(lengths, seq_len)
    check_any(dataset, usable & (wanted > 0), seq_len, how)
    order = np.repeat(np.arange(len(usable)), np.where(usable, wanted, 0))
    order = order[shuffled(len(order), seed)]
    edges = np.concatenate([[0], np.cumsum(lengths[order])])
    cuts = _xtuner_cuts(edges, seq_len) if how == "xtuner" else _even_cuts(edges[-1], seq_len)
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
    continues = (start + length < dataset.offsets[document + 1]) & (how == "concat")
    targets = dataset.targets[document]
    for p in np.flatnonzero(length < np.diff(dataset.offsets)[document]):
        first, last = int(start[p]), int(start[p] + length[p])
        targets[p] = count_split(dataset, int(document[p]), first, last, bool(continues[p]))
    taken = np.bincount(document, minlength=len(usable)) > 0
    lost = np.flatnonzero(usable & (wanted > 0) & ~taken)
    untrained = np.flatnonzero(~usable & (wanted > 0))
    held = np.zeros(len(usable), np.int64)
    np.add.at(held, document, length)
    part = np.flatnonzero(taken & (held < dataset.lengths * wanted))
    return (
        Pieces(
            start=start,
            length=length,
            continues=continues,
            targets=targets,
            document=document,
            dropped=tuple(
                [problem(dataset, d, "in the rest that XTuner loses") for d in lost]
                + [problem(dataset, d, "none is trained on") for d in untrained]
            ),
            truncated=tuple(problem(dataset, d, f"cut as by {how}") for d in part),
        ),
        Rows(pieces=np.arange(len(begins)), offsets=np.searchsorted(begins, cuts)),
    )


def _even_cuts(total: int | np.integer, seq_len: int) -> Int64[np.ndarray, " E"]:
    """Where rows begin in the stream, and where the last one ends."""
    return np.append(np.arange(0, total, seq_len), total).astype(np.int64)


def _xtuner_cuts(edges: Int64[np.ndarray, " n"], seq_len: int) -> Int64[np.ndarray, " E"]:
    cuts = [0]
    for last in range(XTUNER_BATCH, len(edges) - 1 + XTUNER_BATCH, XTUNER_BATCH):
        end = int(edges[min(last, len(edges) - 1)])
        if end - cuts[-1] < seq_len:
            cuts.append(end)
        else:
            cuts += range(cuts[-1] + seq_len, end + 1, seq_len)
    return np.array(cuts, np.int64)
