"""Mixture of files: weights, the documents held out for validation, and random orders."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from train.data.files.tables import arrow_files
from train.data.tokens.dataset import Dataset

Split = Literal["train", "val"]

LARGEST_WEIGHT = 1000  # each time an epoch has a file takes memory for every document


class Source(NamedTuple):
    """An argument of --data."""

    argument: str  # as it was typed
    path: Path  # without the weight
    files: list[Path]  # one, or those of a directory, which are one pool
    weight: float  # number of times that an epoch has them


def parse_source(source: str | Path) -> Source:
    """Split `file:weight`, weight 1 by default; raise ValueError if one of them is unusable."""
    path, weight = Path(source), 1.0
    before, colon, number = str(source).rpartition(":")
    if colon and not path.exists():
        with contextlib.suppress(ValueError):  # a colon in a name
            path, weight = Path(before), float(number)
    if not 0 < weight <= LARGEST_WEIGHT:
        raise ValueError(
            f"{source}: the weight must be above 0 and at most {LARGEST_WEIGHT:,}: the number of"
            " times that an epoch has the file"
        )
    return Source(str(source), path, arrow_files(path) if path.is_dir() else [path], weight)


def repeats(
    dataset: Dataset,
    sources: Sequence[Source],
    *,
    seed: int,
    hold_out: float = 0.0,
    split: Split = "train",
) -> Int64[np.ndarray, " D"]:
    """Return the number of times that an epoch has each document.

    Weight 2 is twice, 0.3 a random 30% of the source's documents, 1.3 both. A share `hold_out` of
    each source's documents is chosen first, at random: "val" has these once, "train" the others.

    Raises:
        ValueError: there are too few documents to hold some out, or for a weight.
    """
    result = np.zeros(len(dataset.file), np.int64)
    source_of = _by_document(dataset, sources, range(len(sources)))
    for number, source in enumerate(sources):
        documents = np.flatnonzero(source_of == number)
        count = len(documents)
        held = round(hold_out * count)
        order = documents[permutation(count, seed, 2, number)]
        if split == "val":
            result[order[:held]] = 1
            continue
        rest = order[held:]
        whole = int(source.weight)
        result[rest] = whole
        result[rest[: round((source.weight - whole) * len(rest))]] += 1
        if len(rest) and not result[rest].any():
            raise ValueError(
                f"{source.argument} holds none of its {len(rest):,} document(s): the weight must be"
                f" at least {1 / len(rest):.2g}"
            )
    if hold_out and not result.any():
        raise ValueError(
            f"a share of {hold_out:g} of {len(result):,} documents leaves none for {split}: name"
            " files for validation instead"
        )
    return result


def name_sources(
    dataset: Dataset, sources: Sequence[Source]
) -> tuple[tuple[str, ...], Int64[np.ndarray, " D"]]:
    """Return the paths of the sources, each once, and the index of each document's in them."""
    names = tuple(dict.fromkeys(str(source.path) for source in sources))
    numbers = [names.index(str(source.path)) for source in sources]
    return names, _by_document(dataset, sources, numbers)


def _by_document(
    dataset: Dataset, sources: Sequence[Source], values: Sequence[int]
) -> Int64[np.ndarray, " D"]:
    """Return the value of each document's source."""
    files = [len(source.files) for source in sources]
    return np.repeat(np.array(values, np.int64), files)[dataset.file]


def permutation(n: int, *key: int) -> Int64[np.ndarray, " n"]:
    """Return a random order of 0..n-1 that depends on `key` alone, for ever: a run depends on it.

    Made of the raw bits of PCG64, which NumPy promises not to change; the stream of
    `Generator.permutation` may change with a NumPy release, and with it every resumed run. The key
    is integers >= 0, such as seed and epoch.

    References:
        NEP 19, "Random number generator policy".
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)
