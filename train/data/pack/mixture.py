"""How much of each file: weights, and what is held out for validation."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from train.data.files.source import files_of
from train.data.pack.order import shuffled
from train.data.tokens.dataset import Dataset

Split = Literal["train", "val"]

MOST = 1000  # times that an epoch may hold a file: each takes memory for every document


class Source(NamedTuple):
    """What one argument of --data names.

    Attributes:
        name: as it was typed.
        files: one, or those of a directory, which are one pool.
        weight: how often an epoch holds them.
    """

    name: str
    files: list[Path]
    weight: float


def parse_source(source: str | Path) -> Source:
    """Splits `file:weight`; the weight is 1 where there is none.

    Raises:
        ValueError: a weight that is out of bounds, or a directory of another kind.
    """
    path, weight = Path(source), 1.0
    before, colon, number = str(source).rpartition(":")
    if colon and not path.exists():
        with contextlib.suppress(ValueError):  # a colon in a name
            path, weight = Path(before), float(number)
    if not 0 < weight <= MOST:
        raise ValueError(
            f"{source}: the weight must be above 0 and at most {MOST:,}: how often an epoch holds"
            " the file"
        )
    return Source(str(source), files_of(path), weight)


def times(
    dataset: Dataset,
    sources: Sequence[Source],
    *,
    seed: int,
    hold_out: float = 0.0,
    split: Split = "train",
) -> Int64[np.ndarray, " D"]:
    """How often an epoch holds each document.

    Weight 2 is twice, 0.3 a random 30% of the source's documents, 1.3 both. What is held out is
    chosen first, at random in each source, and has no weight in "val".

    Args:
        dataset: the documents.
        sources: of its files, in their order.
        seed: of the choices.
        hold_out: share of the documents that "val" has and "train" has not.
        split: which of the two.

    Raises:
        ValueError: there are too few documents to hold some out, or for a weight.
    """
    result = np.zeros(len(dataset.file), np.int64)
    files = [len(source.files) for source in sources]
    source_of = np.repeat(np.arange(len(sources)), files)[dataset.file]
    for number, source in enumerate(sources):
        documents = np.flatnonzero(source_of == number)
        count = len(documents)
        held = round(hold_out * count)
        order = documents[shuffled(count, seed, 2, number)]
        if split == "val":
            result[order[:held]] = 1
            continue
        rest = order[held:]
        whole = int(source.weight)
        result[rest] = whole
        result[rest[: round((source.weight - whole) * len(rest))]] += 1
        if len(rest) and not result[rest].any():
            raise ValueError(
                f"{source.name} holds none of its {len(rest):,} document(s): the weight must be at"
                f" least {1 / len(rest):.2g}"
            )
    if hold_out and not result.any():
        raise ValueError(
            f"a share of {hold_out:g} of {len(result):,} documents leaves none for {split}: name"
            " files for validation instead"
        )
    return result
