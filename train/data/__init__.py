"""Files to packed batches: open_data(paths, tokenizer, ...) -> Loader of Batch.

source (files to rows) > formats (rows to samples) > template (samples to tokens) >
dataset (all of it in one array) > packing (documents to rows) > loader (rows to batches).
"""

from train.data.loader import Loader, open_data
from train.data.packing import Batch, Overlong
from train.data.report import Problem, Report

__all__ = ["Batch", "Loader", "Overlong", "Problem", "Report", "open_data"]
