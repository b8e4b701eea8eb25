"""Measure a cell with PyTorch in a child process: `python -m train.bench.torch_cell`.

The fields are JSON on standard input. The step is that of a user of transformers: LlamaForCausalLM
of the same shape (InternLM2 is Llama under other names), random weights, the model's loss,
gradients clipped at 1, fused AdamW. With param_dtype fp32, weights and moments are fp32 and matrix
products run under autocast; with bf16 both are bf16. Documents are a dense mask [B, 1, T, T], the
only one that SDPA and eager support.
torch_liger replaces norm, rotary embedding, SwiGLU and loss by Liger's kernels and computes
attention with FlashAttention-4, which takes the ends of the documents.

PyTorch is not a dependency: only the bench runs this module.
"""

import dataclasses
import gc
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import numpy as np

# pyright runs without PyTorch too.
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, LlamaConfig

from jaxattn.bench import harness
from models.config import PRESETS
from models.weights import llama
from train.bench.shapes import TORCH, Cell, batches, cell_of, outcome, time_steps
from train.data.pack.packing import Batch
from train.metrics.metrics import resident_peak

RATE = 1e-4
LIGER = "torch_liger"


def measure(cell: Cell) -> dict[str, Any]:
    """Time the step with the first setting that fits the memory.

    Args:
        cell: the cell; remat is "none", "full" (gradient checkpointing), or None for the first
            that fits of: none; full; full with 2, 4, ... microbatches.

    Returns:
        `shapes.outcome` with the remat, and grad_accum; peak_memory_bytes of PyTorch's tensors;
        loss. Or `why` the cell cannot run.
    """
    if why := why_not(cell):
        return {"why": why}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = batches(cell, cell.batch_size)
    tried = []
    for remat, grad_accum in ways(cell):
        try:
            return _measure(dataclasses.replace(cell, remat=remat), work, grad_accum, device)
        except torch.OutOfMemoryError:
            tried.append(f"{remat} x {grad_accum}")
        gc.collect()  # the error's traceback held the model
        torch.cuda.empty_cache()
    return {"why": f"out of memory, with remat x microbatches of {', '.join(tried)}"}


def why_not(cell: Cell) -> str | None:
    """Return the reason why PyTorch cannot run the cell; None if it can."""
    if cell.dtype == "bfloat16" and not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    if cell.remat not in (None, "none", "full"):
        return f"PyTorch's remat is none or full (gradient checkpointing), not {cell.remat}"
    if cell.grad_accum > 1 or cell.z_loss or cell.deterministic or cell.matmul != "bf16":
        return "PyTorch's cells have no --grad_accum, --z_loss, --deterministic and --matmul"
    if cell.optim != "adamw" or cell.state != cell.param_dtype:
        return "PyTorch's fused AdamW keeps its moments in the type of the weights"
    return None


def ways(cell: Cell) -> Iterator[tuple[str, int]]:
    """Yield (remat, microbatches), the fastest first."""
    for remat in ("none", "full") if cell.remat is None else (cell.remat,):
        yield remat, 1
    grad_accum = 2
    while (
        cell.remat is None and grad_accum <= cell.batch_size and cell.batch_size % grad_accum == 0
    ):
        yield "full", grad_accum
        grad_accum *= 2


def make_model(cell: Cell, device: str) -> Any:
    """Return the model with random weights, in training mode."""
    if cell.attn == LIGER:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            apply_liger_kernel_to_llama,
        )

        apply_liger_kernel_to_llama()  # before the model is made: it replaces its classes
    stored = torch.bfloat16 if cell.param_dtype == "bf16" else torch.float32
    config = LlamaConfig.from_dict(llama.hf_config(PRESETS[cell.model], dtype="float32"))
    config.use_cache = False
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=TORCH[cell.attn], dtype=stored
        )
    if cell.remat == "full":
        new_name = getattr(model, "activation_checkpointing_enable", None)  # its newer name
        (new_name or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def inputs(batch: Batch, device: str, dtype: Any, attn: str = "torch_sdpa") -> dict[str, Any]:
    """Return the model's arguments for rows [B, T]; positions without a target have no loss.

    Args:
        batch: the rows.
        device: PyTorch's name of the device.
        dtype: of the dense mask.
        attn: implementation; for torch_liger packed rows are one row [1, B * T], with the ends of
            all documents.
    """
    tokens, targets, learned = (
        torch.as_tensor(np.ascontiguousarray(x), device=device)
        for x in (batch.tokens, batch.targets, batch.loss_mask)
    )
    arguments: dict[str, Any] = {
        "input_ids": tokens.long(),
        "labels": tokens.long(),  # not used beside shift_labels, but without it there is no loss
        "shift_labels": targets.long().masked_fill(learned == 0, -100),
        "position_ids": torch.as_tensor(batch.positions, device=device).long(),
    }
    if batch.segment_ids is not None and attn == LIGER:
        ends = document_ends(np.asarray(batch.segment_ids))
        longest = int(np.diff(ends).max())
        arguments = {name: rows.reshape(1, -1) for name, rows in arguments.items()}
        for side in "qk":
            arguments[f"cu_seq_lens_{side}"] = torch.as_tensor(ends, device=device)
            arguments[f"max_length_{side}"] = longest
    elif batch.segment_ids is not None:
        ids = torch.as_tensor(batch.segment_ids, device=device)
        seen = (ids[:, :, None] == ids[:, None, :]).tril_()
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        arguments["attention_mask"] = mask.masked_fill_(seen.logical_not_(), -torch.inf)[:, None]
    return arguments


def document_ends(segment_ids: np.ndarray) -> np.ndarray:
    """Return 0 and the ends of all documents of rows [B, T] that are joined, int32.

    The padding of a row counts as a document.
    """
    first = np.ones(segment_ids.shape, bool)
    first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.append(np.flatnonzero(first), segment_ids.size).astype(np.int32)


def _measure(cell: Cell, work: list[Batch], grad_accum: int, device: str) -> dict[str, Any]:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    compute = torch.bfloat16 if cell.dtype == "bfloat16" else torch.float32
    model = make_model(cell, device)
    rule = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    autocast = torch.autocast(device, dtype=compute, enabled=compute != model.dtype)
    on_device = [
        [inputs(part, device, compute, cell.attn) for part in _parts(rows, grad_accum)]
        for rows in work
    ]

    def step(i: int) -> Any:
        for part in on_device[i % len(work)]:
            with autocast:
                loss = model(**part).loss
            (loss / grad_accum).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        rule.step()
        rule.zero_grad(set_to_none=True)
        return loss.detach()

    loss: Any = None

    def wait(out: Any) -> None:
        nonlocal loss
        loss = out.item()

    first, seconds = time_steps(step, wait, cell.repeats)
    on_gpu = device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else device
    return (
        outcome(cell, work, seconds=seconds, device=name, devices=1)
        | {
            "grad_accum": grad_accum,
            "first_step_seconds": first,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident_peak(),
            "loss": loss,
            "torch": torch.__version__,
        }
        | _packages(cell)
    )


def _packages(cell: Cell) -> dict[str, str]:
    if cell.attn != LIGER:
        return {}
    names = ("liger-kernel", "flash-attn-4")
    return {"packages": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)}


def _parts(batch: Batch, grad_accum: int) -> Iterator[Batch]:
    for part in range(grad_accum):
        yield Batch(*(None if x is None else x[part::grad_accum] for x in batch))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    given = harness.child_fields()
    harness.report(lambda: measure(cell_of(given)), given)
