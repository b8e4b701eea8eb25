"""The tokens of all parts as one sequence, which may be far larger than the memory."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

MAPPED = 128  # files that are mapped at a time; each costs a file descriptor, and pages once read


@dataclasses.dataclass(frozen=True, slots=True)
class OnDisk:
    """Tokens that stand at the beginning of a file, as int32.

    Attributes:
        path: the file.
        count: how many.
    """

    path: Path
    count: int

    def __len__(self) -> int:
        return self.count

    def map(self) -> Int32[np.ndarray, " n"]:
        """Maps the file; pages are read when they are looked at."""
        return np.memmap(self.path, np.int32, "r", shape=self.count)


class Tokens:
    """Arrays of tokens, in memory or on disk, as if they were one after the other in one array.

    Files are mapped when they are read, and the one that was not read for longest is let go: the
    process holds `MAPPED` of them, and their pages, however many there are.
    """

    def __init__(self, arrays: Sequence[Int32[np.ndarray, " n"] | OnDisk]):
        self._arrays = [array for array in arrays if len(array)]
        self._starts = list(itertools.accumulate(map(len, self._arrays), initial=0))
        self._map = functools.lru_cache(MAPPED)(OnDisk.map)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> Int32[np.ndarray, " n"]:
        """Copies the tokens start..stop."""
        start, stop, _ = span.indices(len(self))
        pieces = []
        number = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            first, array = self._starts[number], self._arrays[number]
            here = self._map(array) if isinstance(array, OnDisk) else array
            piece = here[start - first : stop - first]
            pieces.append(piece)
            start += len(piece)
            number += 1
        return np.concatenate([np.zeros(0, np.int32), *pieces])
