"""The bench's cells of PyTorch: `python -m train.bench.torch_cell '<json>'`, as `train.bench.cell`.

The step is what a user of transformers writes: LlamaForCausalLM of the same shape (InternLM2 is
Llama under other names), random weights, its own loss, gradients clipped at 1, fused AdamW. With
param_dtype fp32 weights and moments are fp32 and the products run under autocast; with bf16 both
are bf16. Documents are a dense mask [B, 1, T, T], the only one that SDPA and eager know.

PyTorch is no dependency: this file is run when a cell of it is asked for.
"""

import dataclasses
import gc
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

# pyright runs without PyTorch too.
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, LlamaConfig

from models.config import PRESETS
from models.weights import llama
from train.bench.shapes import TORCH, Cell, batches, outcome, time_steps
from train.data import Batch
from train.metrics.metrics import resident_peak

RATE = 1e-4


def measure(cell: Cell) -> dict[str, Any]:
    """Times the step, in the first way that the memory allows.

    Args:
        cell: what to measure; its remat is "none", "full" (gradient checkpointing), or None for
            the first of: none; full; full, with the rows in 2, 4, ... parts (accumulation).

    Returns:
        `shapes.outcome` with the remat and: grad_accum, the parts; peak_memory_bytes, that
        PyTorch held in tensors; loss. Or "why" it cannot run.
    """
    if why := why_not(cell):
        return dataclasses.asdict(cell) | {"why": why}
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
    why = f"out of memory, with remat x parts of {', '.join(tried)}"
    return dataclasses.asdict(cell) | {"why": why}


def why_not(cell: Cell) -> str | None:
    """Why PyTorch cannot run the cell; None if it can."""
    if cell.dtype == "bfloat16" and not torch.cuda.is_available():
        return "PyTorch finds no CUDA GPU"
    if cell.remat not in (None, "none", "full"):
        return f"PyTorch's remat is none or full (gradient checkpointing), not {cell.remat}"
    if cell.optim != "adamw" or cell.state != cell.param_dtype:
        return "PyTorch's fused AdamW keeps its moments in the type of the weights"
    return None


def ways(cell: Cell) -> Iterator[tuple[str, int]]:
    """(remat, parts of the rows), the fastest first."""
    for remat in ("none", "full") if cell.remat is None else (cell.remat,):
        yield remat, 1
    grad_accum = 2
    while (
        cell.remat is None and grad_accum <= cell.batch_size and cell.batch_size % grad_accum == 0
    ):
        yield "full", grad_accum
        grad_accum *= 2


def make_model(cell: Cell, device: str) -> Any:
    """The model with random weights, ready to train."""
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


def inputs(batch: Batch, device: str, dtype: Any) -> dict[str, Any]:
    """Arguments of the model for rows [B, T]; positions without a target are not learned."""
    tokens, targets, learned = (
        torch.as_tensor(np.ascontiguousarray(x), device=device)
        for x in (batch.tokens, batch.targets, batch.loss_mask)
    )
    arguments = {
        "input_ids": tokens.long(),
        "labels": tokens.long(),  # only says that the loss is wanted
        "shift_labels": targets.long().masked_fill(learned == 0, -100),
        "position_ids": torch.as_tensor(batch.positions, device=device).long(),
    }
    if batch.segment_ids is not None:
        ids = torch.as_tensor(batch.segment_ids, device=device)
        seen = (ids[:, :, None] == ids[:, None, :]).tril_()
        mask = torch.zeros(seen.shape, dtype=dtype, device=device)
        arguments["attention_mask"] = mask.masked_fill_(seen.logical_not_(), -torch.inf)[:, None]
    return arguments


def _measure(cell: Cell, work: list[Batch], grad_accum: int, device: str) -> dict[str, Any]:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    compute = torch.bfloat16 if cell.dtype == "bfloat16" else torch.float32
    model = make_model(cell, device)
    rule = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    autocast = torch.autocast(device, dtype=compute, enabled=compute != model.dtype)
    on_device = [[inputs(p, device, compute) for p in _parts(b, grad_accum)] for b in work]

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
    return outcome(cell, work, seconds=seconds, device=name, devices=1) | {
        "grad_accum": grad_accum,
        "first_step_seconds": first,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident_peak(),
        "loss": loss,
        "torch": torch.__version__,
    }


def _parts(batch: Batch, grad_accum: int) -> Iterator[Batch]:
    for part in range(grad_accum):
        yield Batch(*(None if x is None else x[part::grad_accum] for x in batch))  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Measures the cell of the command line and prints the result, or why there is none."""
    fields = json.loads(sys.argv[1])
    cell = Cell(**fields | {"data": tuple(fields["data"])})
    try:
        result = measure(cell)
    except (ValueError, OSError) as error:
        result = dataclasses.asdict(cell) | {"why": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
