"""A process that tokenises parts for another one (pool.py), until its input ends.

A process of its own, and not one of `multiprocessing`: it runs nothing of the program that asks for
it, shares no lock with it, and ends with it whatever ends that, SIGKILL included.

Both directions are pickles. In: the tokenizer, then (part, path) again and again. Out: for each of
these the error that writing the part's documents raised, or None.
"""

import gc
import pickle
import signal
import sys
from typing import Any, BinaryIO

from models.tokenizer import Tokenizer
from train.data.tokens.encode import encode_part


def main() -> None:
    """Serves one process over stdin and stdout."""
    # There is nothing to collect, rows and tokens hold no cycles, and looking for it among
    # millions of lists takes a tenth of the time.
    gc.disable()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody to answer: it ends without a word
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints is no answer
    tokenizer: Tokenizer | None = _next(given)
    while tokenizer is not None and (job := _next(given)) is not None:
        part, path = job
        try:
            encode_part(part, tokenizer).write(path)
            pickle.dump(None, answers)
        except OSError as error:
            pickle.dump(error, answers)
        answers.flush()


def _next(given: BinaryIO) -> Any:
    try:
        return pickle.load(given)
    except (EOFError, pickle.UnpicklingError):  # the other process ended, or was ended in mid-word
        return None
