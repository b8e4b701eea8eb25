"""Cells of `python -m train.bench`: fields, rows of tokens, timing and counting."""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from jaxattn.bench.shapes import document_lengths
from jaxattn.device import peak_flops
from models.config import PRESETS
from models.tokenizer import load_tokenizer
from train.cache_dirs import token_cache
from train.config.sections import LoRAConfig, MeshConfig
from train.data.open import open_data
from train.data.pack.packing import Batch
from train.data.tokens.cache import ReadOptions
from train.metrics.flops import causal_pairs, training_flops

RowKind = Literal["dense", "packed", "data"]

TORCH = {"torch_sdpa": "sdpa", "torch_eager": "eager", "torch_liger": "flash_attention_4"}
"""Implementation of PyTorch in the bench -> its attention in transformers. torch_liger also has
Liger's kernels for the rest of the model."""

STEPS = 3
"""Steps between two waits for the device, queued as in training."""

FIRST_LOSSES = 10
"""Losses of a cell that are recorded, at most, to compare meshes and implementations."""

LONG_STEP = 2.0
"""Seconds of a step from which a timed run is one step: queueing no longer matters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Fields of a measurement."""

    model: str
    """Preset."""

    attn: str
    """Implementation: jaxattn's, or one of TORCH."""

    seq_len: int
    """Tokens of a row."""

    tokens: int
    """Tokens of a step, per device that holds rows; at least one row each."""

    mesh: str | None
    """Device mesh, such as "fsdp=4,tensor=2", on the first devices; None: fsdp over all."""

    rows: RowKind
    """One document each, documents of log-normal length, or packed files."""

    remat: str | None
    """Key of `models.remat.REMAT`, or several with commas; None: the fastest that fits."""

    scan_layers: bool | None
    """Compile one layer for all layers; None: as train.main."""

    tile_size: int | None
    """Tokens of a tile; None: as train.main."""

    dtype: str
    """Compute dtype."""

    matmul: Literal["bf16", "fp8"]
    """Matrix products of the blocks: in the compute dtype, or in 8 bits."""

    param_dtype: Literal["fp32", "bf16"]
    """Dtype of the stored weights."""

    optim: str
    """Optimizer."""

    state: Literal["fp32", "bf16", "int8"]
    """Dtype of AdamW's moments."""

    lora_rank: int | None
    """Rank of adapters on all linear layers of the blocks; None: all weights are trained."""

    base_dtype: Literal["fp32", "bf16", "nf4", "int8"] | None
    """Storage of the frozen weights beside adapters."""

    grad_accum: int
    """Microbatches of a step."""

    z_loss: float
    """Factor of the z-loss."""

    deterministic: bool
    """Bitwise reproducible steps."""

    repeats: int
    """Number of timed runs of `STEPS` steps, or of one from `LONG_STEP` on."""

    data: tuple[str, ...]
    """Files of rows "data"."""

    tokenizer: str
    """Tokenizer of the files."""

    @property
    def lora(self) -> LoRAConfig:
        """Return the adapters as flags of train.main."""
        return LoRAConfig(rank=self.lora_rank)

    @property
    def batch_size(self) -> int:
        """Return the rows of a step per device that holds rows: a multiple of grad_accum."""
        return max(1, self.tokens // self.seq_len // self.grad_accum) * self.grad_accum


def parse_mesh(text: str) -> MeshConfig:
    """Return the mesh of a text such as "fsdp=4,tensor=2"; axes that are not named have size 1.

    Raises:
        ValueError: an axis is unknown, or a size is no number of at least 1.
    """
    axes = {field.name for field in dataclasses.fields(MeshConfig)}
    sizes: dict[str, int] = {"fsdp": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in axes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh={text} must be AXIS=SIZE,... of the axes {', '.join(sorted(axes))} with "
                "sizes of at least 1, such as fsdp=4,tensor=2"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def device_count(mesh: MeshConfig) -> int:
    """Return the number of devices of a mesh of `parse_mesh`."""
    return math.prod(dataclasses.asdict(mesh).values())


def cell_of(fields: dict[str, Any]) -> Cell:
    """Return the cell of fields that were passed as JSON."""
    given: dict[str, Any] = {**fields, "data": tuple(fields["data"])}
    return Cell(**given)


def batches(cell: Cell, rows: int) -> list[Batch]:
    """Return the batches of the steps of a timed run, in order.

    Args:
        cell: the cell.
        rows: rows of a batch.

    Returns:
        `STEPS` batches of files, else one batch for all steps. Dense rows have no segment_ids: a
        causal mask, which every implementation supports.

    Raises:
        ValueError, OSError: data or tokenizer cannot be read, or do not suit the model.
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
    length, reading = cell.seq_len, ReadOptions(cache=token_cache())
    with open_data(
        cell.data, tokenizer, seq_len=length, batch_size=rows, reading=reading
    ) as loader:
        return [next(loader)._replace(sources=None) for _ in range(STEPS)]


def random_rows(rows: int, seq_len: int, vocab_size: int, *, packed: bool) -> Batch:
    """Return rows [rows, seq_len] without padding, with a target at every position.

    Args:
        rows: rows of the batch.
        seq_len: tokens of a row.
        vocab_size: of the uniform random tokens.
        packed: True: documents with the lengths of jaxattn.bench's 7b_32k_packed (log-normal,
            median 1,500, sigma 1), the same in every row; False: one document a row.
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
    """Return the seconds of the first step, and the median seconds of a step in the timed runs.

    A run is `STEPS` steps, after as many steps of warm-up. From `LONG_STEP` on a run is one step,
    and the second step is the first run.

    Args:
        step: launches the i-th step, without waiting for it.
        wait: waits for the result of `step`.
        repeats: number of timed runs.
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
    """Return the cell's fields and the results that follow from its time.

    Args:
        cell: the cell.
        work: its batches; padding does not count as work.
        seconds: of a step.
        device: `device_kind`, for the peak.
        devices: number of devices.

    Returns:
        batch_size, over all devices; ms; tokens_per_second, without padding; filled, the fraction
        of the rows without padding; mfu, if the device's peak is known.
    """
    tokens = pairs = positions = 0
    for batch in work:
        rows, length = batch.tokens.shape
        ids = np.ones((rows, length), np.int32) if batch.segment_ids is None else batch.segment_ids
        tokens += int(np.count_nonzero(ids))
        pairs += causal_pairs(ids)
        positions += rows * length
    found = dataclasses.asdict(cell) | {
        "batch_size": positions // len(work) // cell.seq_len,
        "ms": 1e3 * seconds,
        "tokens_per_second": tokens / len(work) / seconds,
        "filled": tokens / positions,
    }
    if peak := peak_flops(device):
        useful = training_flops(PRESETS[cell.model], tokens, pairs, lora=cell.lora.lora) / len(work)
        found["mfu"] = useful / seconds / (peak * devices)
    return found
