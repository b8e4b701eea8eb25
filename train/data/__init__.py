"""Files to packed batches: open_data(paths, tokenizer, ...) -> Loader of Batch.

source (files to parts: cuts, arrays, tables) > rows (parts to rows) > formats (rows to samples) >
template (samples to tokens) > encode (all of this for a part) > cache (parts on disk, filled by
pool) > dataset (parts as one) > share (how much of each file) > pieces (documents to pieces) >
packing (pieces to rows of a batch) > loader (rows to batches) > open (all of it).
"""

from train.data.cache import default_cache
from train.data.loader import Loader
from train.data.open import open_data
from train.data.packing import Batch
from train.data.pieces import Overlong
from train.data.report import Problem, Report

__all__ = ["Batch", "Loader", "Overlong", "Problem", "Report", "default_cache", "open_data"]
