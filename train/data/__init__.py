"""Files to packed batches: open_data(paths, tokenizer, ...) -> Loader of Batch.

files/   source (files to parts: cuts, arrays, tables) > rows (parts to rows) > formats (rows to
         samples) > template (samples to tokens)
tokens/  encode (all of that for a part) > cache (parts on disk, filled by pool) > dataset (parts as
         one sequence)
pack/    share (how much of each file) > pieces (documents to pieces) > packing (pieces to rows of a
         batch; without regard for documents: stream)

Above them loader (rows to batches) and open (all of it); report counts what became of every row.
"""

from train.data.loader import Loader
from train.data.open import Packing, open_data
from train.data.pack.packing import Batch
from train.data.pack.spans import TooLong
from train.data.report import Problem, Report
from train.data.tokens.cache import default_cache

__all__ = [
    "Batch",
    "Loader",
    "TooLong",
    "Packing",
    "Problem",
    "Report",
    "default_cache",
    "open_data",
]
