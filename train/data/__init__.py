"""Files to packed batches: open_data(paths, tokenizer, ...) -> Loader of Batch.

files/   readers and tables (files to chunks) > records (chunks to rows) > formats (rows to training
         examples) > template (examples to tokens)
tokens/  encode (all of that for a chunk) > cache (chunks on disk, filled by pool) > dataset (chunks
         as one array)
pack/    mixture (weights of files) > spans (documents to spans) > packing (spans to rows of a
         batch; without regard for documents: stream)

Above them loader (rows to batches) and open (all of it); report counts every row that was read.
Names are imported when they are first used: a worker process needs no loader, and no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.loader import Loader, Shard
    from train.data.open import PackingOptions, open_data, read_options
    from train.data.pack.mixture import parse_source
    from train.data.pack.packing import Batch, source_dtype
    from train.data.pack.spans import TooLong
    from train.data.report import Problem, Report
    from train.data.tokens.cache import ReadOptions

_MODULES = {
    "Batch": "pack.packing",
    "Loader": "loader",
    "PackingOptions": "open",
    "Problem": "report",
    "ReadOptions": "tokens.cache",
    "Report": "report",
    "Shard": "loader",
    "TooLong": "pack.spans",
    "open_data": "open",
    "parse_source": "pack.mixture",
    "read_options": "open",
    "source_dtype": "pack.packing",
}

__all__ = [
    "Batch",
    "Loader",
    "PackingOptions",
    "Problem",
    "ReadOptions",
    "Report",
    "Shard",
    "TooLong",
    "open_data",
    "parse_source",
    "read_options",
    "source_dtype",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
