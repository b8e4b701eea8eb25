"""A worker process of pool.py: it tokenizes chunks and writes their documents.

This module imports nothing large. Whoever starts a process waits until it has read its arguments,
and it imports this module before it reads on: processes start at the same time only if both take
little.
"""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_encode: list[Callable[[Any], Any]] = []


def start(encode: bytes) -> None:
    """Set up this process; `encode` is a pickled function from a chunk to its documents."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encode.append(pickle.loads(encode))


def write(chunk: Any, path: Path) -> None:
    """Tokenize a chunk and write its documents."""
    _encode[0](chunk).write(path)


def _end_with_parent() -> None:
    """End this process when its parent ends, whatever ends it, SIGKILL included."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
