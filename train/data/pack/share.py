"""How much of each file: weights, and what is held out for validation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from train.data.pack.order import shuffled
from train.data.tokens.dataset import Dataset

Split = Literal["train", "val"]


def parse_source(source: str | Path) -> tuple[Path, float]:
    """Splits `file:weight`; the weight is 1 where there is none.

    Raises:
        ValueError: a weight that is not above 0.
    """
    path, colon, number = str(source).rpartition(":")
    if not colon or Path(source).exists():
        return Path(source), 1.0
    try:
        weight = float(number)
    except ValueError:
        return Path(source), 1.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"{source}: the weight must be above 0: how often an epoch holds the file")
    return Path(path), weight


def times(
    dataset: Dataset,
    weights: Sequence[float],
    *,
    seed: int,
    hold_out: float = 0.0,
    split: Split = "train",
) -> Int64[np.ndarray, " D"]:
    """How often an epoch holds each document.

    Weight 2 is twice, 0.3 a random 30% of the file's documents, 1.3 both. What is held out is
    chosen first, at random in each file, and has no weight in "val".

    Args:
        dataset: the documents.
        weights: of each file.
        seed: of the choices.
        hold_out: share of the documents that "val" has and "train" has not.
        split: which of the two.

    Raises:
        ValueError: there are too few documents to hold some out.
    """
    result = np.zeros(len(dataset.file), np.int64)
    for file, weight in enumerate(weights):
        documents = np.flatnonzero(dataset.file == file)
        count = len(documents)
        held = round(hold_out * count)
        order = documents[shuffled(count, seed, 2, file)]
        if split == "val":
            result[order[:held]] = 1
            continue
        rest = order[held:]
        whole = int(weight)
        result[rest] = whole
        result[rest[: round((weight - whole) * len(rest))]] += 1
    if hold_out and not result.any():
        raise ValueError(
            f"a share of {hold_out:g} of {len(result):,} documents leaves none for {split}: name"
            " files for validation instead"
        )
    return result
