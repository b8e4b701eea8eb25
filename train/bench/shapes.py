"""A cell of `python -m train.bench`: its fields, its rows, how it is timed and counted."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from jaxattn.bench.shapes import document_lengths
from jaxattn.device import peak_flops
from models.config import PRESETS
from models.tokenizer import load_tokenizer
from train.data import Batch, default_cache, open_data
from train.metrics.flops import causal_pairs, training_flops

RowKind = Literal["dense", "packed", "data"]

TORCH = {"torch_sdpa": "sdpa", "torch_eager": "eager"}
"""The bench's names of PyTorch's attention, and transformers' own."""

STEPS = 3
"""Steps from one wait for the device to the next, queued as in training."""

LONG_STEP = 2.0
"""Seconds from which a run is one step: what is queued no longer matters, the GPU's time does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What to measure."""

    model: str
    """A preset."""

    attn: str
    """Implementation: jaxattn's, or torch_sdpa, torch_eager."""

    seq_len: int
    """Tokens of a row."""

    tokens: int
    """Of a step, per device that holds rows; at least one row each."""

    rows: RowKind
    """One document each, documents of log-normal length, or packed files."""

    remat: str | None
    """Key of `models.remat.REMAT`; None: the fastest that fits."""

    scan_layers: bool
    """Compile one block for all layers."""

    dtype: str
    """Compute type."""

    param_dtype: Literal["fp32", "bf16"]
    """Of the stored weights."""

    optim: str
    """Optimizer."""

    state: Literal["fp32", "bf16", "int8"]
    """Of AdamW's moments."""

    repeats: int
    """Timed runs of `STEPS` steps, or of one from `LONG_STEP` on; their median counts."""

    data: tuple[str, ...]
    """Files, for rows of "data"."""

    tokenizer: str
    """Makes their ids."""

    @property
    def batch_size(self) -> int:
        """Rows of a step, per device that holds rows."""
        return max(1, self.tokens // self.seq_len)


def batches(cell: Cell, rows: int) -> list[Batch]:
    """The batches that the steps of a timed run work on, one after another.

    Args:
        cell: what to measure.
        rows: of a batch.

    Returns:
        `STEPS` batches of files, else one for all steps. Those without documents have no
        segment_ids: the plain causal mask, which every implementation knows.

    Raises:
        ValueError, OSError: data or tokenizer that cannot be read, or do not suit the model.
    """
    vocab_size = PRESETS[cell.model].vocab_size
    if cell.rows != "data":
        drawn = random_rows(rows, cell.seq_len, vocab_size, packed=cell.rows == "packed")
        return [drawn if cell.rows == "packed" else drawn._replace(segment_ids=None)]
    tokenizer = load_tokenizer(cell.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than the "
            f"{vocab_size} of {cell.model}: choose another --tokenizer or --model"
        )
    length, cache = cell.seq_len, default_cache()
    with open_data(cell.data, tokenizer, seq_len=length, batch_size=rows, cache=cache) as loader:
        return [next(loader) for _ in range(STEPS)]


def random_rows(rows: int, seq_len: int, vocab_size: int, *, packed: bool) -> Batch:
    """Rows [rows, seq_len] without padding, every position with a target.

    Args:
        rows: of the batch.
        seq_len: tokens of a row.
        vocab_size: of the uniform random tokens.
        packed: documents with the lengths of jaxattn.bench's 7b_32k_packed (log-normal, median
            1,500, sigma 1), the same in every row; else one a row.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (rows, seq_len + 1), dtype=np.int32)
    lengths = document_lengths(seq_len, 1500.0, 1.0) if packed else [seq_len]
    of_row = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    counted = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones((rows, seq_len), np.float32),
        segment_ids=np.tile(of_row, (rows, 1)),
        positions=np.tile(counted, (rows, 1)),
    )


def time_steps(
    step: Callable[[int], object], wait: Callable[[object], object], repeats: int
) -> tuple[float, float]:
    """Seconds of the very first step, and of a step after it: median of the timed runs.

    A run is `STEPS` steps, after as many to warm up. From `LONG_STEP` on it is one step, and the
    second step, which no longer waits for anything that comes once, is the first run.

    Args:
        step: launches the i-th step, without waiting for it.
        wait: waits for what `step` returned.
        repeats: timed runs.
    """
    numbers = itertools.count()

    def run(steps: int) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            out = step(next(numbers))
        wait(out)
        return (time.perf_counter() - begun) / steps

    first, second = run(1), run(1)
    if second >= LONG_STEP:
        return first, statistics.median([second, *(run(1) for _ in range(repeats - 1))])
    run(STEPS)  # every batch once
    return first, statistics.median(run(STEPS) for _ in range(repeats))


def outcome(
    cell: Cell, work: list[Batch], *, seconds: float, device: str, devices: int
) -> dict[str, Any]:
    """The cell's fields and what follows from its time.

    Args:
        cell: what was measured.
        work: the batches; their padding is no work.
        seconds: of a step.
        device: its kind, for its peak.
        devices: how many.

    Returns:
        batch_size, over all devices; ms; tokens_per_second, without padding; filled, the share
        of the rows that is not padding; mfu, where the device's peak is known.
    """
    tokens = pairs = places = 0
    for batch in work:
        rows, length = batch.tokens.shape
        ids = np.ones((rows, length), np.int32) if batch.segment_ids is None else batch.segment_ids
        tokens += int(np.count_nonzero(ids))
        pairs += causal_pairs(ids)
        places += rows * length
    found = dataclasses.asdict(cell) | {
        "batch_size": places // len(work) // cell.seq_len,
        "ms": 1e3 * seconds,
        "tokens_per_second": tokens / len(work) / seconds,
        "filled": tokens / places,
    }
    if peak := peak_flops(device):
        useful = training_flops(PRESETS[cell.model], tokens, pairs) / len(work)
        found["mfu"] = useful / seconds / (peak * devices)
    return found
