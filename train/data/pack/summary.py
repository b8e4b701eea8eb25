"""What became of the data, counted from what stands in the rows."""

import numpy as np

from train.data.pack.packing import Rows
from train.data.pack.spans import Pieces
from train.data.report import Report
from train.data.tokens.dataset import Dataset


def summarise(dataset: Dataset, pieces: Pieces, rows: Rows, seq_len: int) -> Report:
    """Counts documents, tokens and rows."""
    per_document = np.bincount(pieces.document, minlength=len(dataset.line))
    _, first = np.unique(pieces.start, return_index=True)  # a weight may repeat a piece
    apart = np.bincount(pieces.document[first])
    per_row = np.add.reduceat(pieces.length[rows.pieces], rows.offsets[:-1])
    return Report(
        files=dataset.files,
        documents=int((per_document > 0).sum()),
        split=int((apart > 1).sum()),
        rows=len(rows),
        seq_len=seq_len,
        tokens=int(pieces.length.sum()),
        loss_tokens=int(pieces.targets.sum()),
        tail=int(per_row.min()),
        left_out=len(dataset.line) - int((per_document > 0).sum()) - len(pieces.dropped),
        broken=dataset.broken,
        dropped=pieces.dropped,
        truncated=pieces.truncated,
    )
