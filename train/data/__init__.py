"""Files to packed batches: open_data(paths, tokenizer, ...) -> Loader of Batch.

source (files to parts) > rows (parts to rows) > formats (rows to samples) > template (samples to
tokens) > encode (all of this for a part) > cache (parts on disk) > dataset (parts as one) > pieces
(documents to pieces) > packing (pieces to rows of a batch) > loader (rows to batches).
"""

from train.data.cache import default_cache
from train.data.loader import Loader
from train.data.open import open_data
from train.data.packing import Batch
from train.data.pieces import Overlong
from train.data.report import Problem, Report

__all__ = ["Batch", "Loader", "Overlong", "Problem", "Report", "default_cache", "open_data"]
