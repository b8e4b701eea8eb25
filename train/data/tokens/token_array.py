"""Tokens of all chunks as one array, which may be far larger than the memory."""

import bisect
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

OPEN = 128  # files that are open at a time


@dataclasses.dataclass(frozen=True, slots=True)
class TokenFile:
    """Tokens at the beginning of a file, as int32."""

    path: Path  # the file
    count: int  # number of tokens
    # (size, time of the last change) of the file when its checksum was right
    stamp: tuple[int, int]

    def __len__(self) -> int:
        return self.count


class TokenArray:
    """Arrays of tokens, in memory or on disk, as one array.

    Files are read, not mapped: a mapped file that somebody cuts off ends the process with SIGBUS.
    The process has at most `OPEN` of them open; the one that was not read for longest is closed.
    """

    def __init__(self, arrays: Sequence[Int32[np.ndarray, " n"] | TokenFile]):
        self._arrays = [array for array in arrays if len(array)]
        self._starts = list(itertools.accumulate(map(len, self._arrays), initial=0))
        self._open = functools.lru_cache(OPEN)(_OpenFile)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> Int32[np.ndarray, " n"]:
        """Return the tokens start..stop, to be read only.

        Raises:
            ValueError: a file changed after its check.
        """
        start, stop, _ = span.indices(len(self))
        pieces = []
        number = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            first, array = self._starts[number], self._arrays[number]
            end = min(stop, first + len(array))
            if isinstance(array, TokenFile):
                pieces.append(self._open(array).read(start - first, end - first))
            else:
                pieces.append(array[start - first : end - first])
            start = end
            number += 1
        if len(pieces) == 1:  # nearly always: a span lies in one chunk
            return pieces[0]
        return np.concatenate([np.zeros(0, np.int32), *pieces])


class _OpenFile:
    """A file of tokens that is open for reading, until nothing refers to it."""

    def __init__(self, file: TokenFile):
        self._fd = -1
        self._fd, self._file = os.open(file.path, os.O_RDONLY), file

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
        data = os.pread(self._fd, 4 * (stop - start), 4 * start)
        if stamp(self._fd) != self._file.stamp:
            raise ValueError(
                f"the token cache {self._file.path} was changed while it was used: start again, and"
                " it is checked and made anew"
            )
        return np.frombuffer(data, np.int32)

    def __del__(self):
        if self._fd >= 0:
            os.close(self._fd)


def stamp(fd: int) -> tuple[int, int]:
    """Return the size of an open file in bytes, and the time of its last change in nanoseconds."""
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns
