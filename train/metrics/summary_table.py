"""Table of runs: what ran where, with which speed, memory and loss; for HTML or as Markdown."""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.metrics.run_records import PARTS, RunRecords, read_run

log = logging.getLogger(__name__)

COLUMNS = (
    *("run", "model", "devices", "rows a step", "attention", "precision", "steps", "loss"),
    *("best validation", "tokens/s", "MFU", "peak GiB", "skipped"),
    *(f"time: {part}" for part in PARTS),
    "versions",
)
"""Names of `cells`."""


def log_table(out: Path) -> None:
    """Log the table of the run in a directory, or what is wrong with its records."""
    try:
        for line in markdown([read_run(out)]):
            log.info(line)
    except (ValueError, OSError) as error:
        log.warning(str(error))


def markdown(runs: Sequence[RunRecords]) -> list[str]:
    """Return the lines of a Markdown table for an issue or a page: a column for each run.

    The table of one run fits a terminal of 80 columns, unless its names are very long.
    """
    rows = [*zip(COLUMNS, *map(cells, runs), strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    ]


def cells(run: RunRecords) -> list[str]:
    """Return the cells of a run under `COLUMNS`; speeds are medians of all steps."""
    last = run.steps[-1]
    losses = [line["loss"] for line in run.evals if line.get("loss") is not None]
    mfu = [line["mfu"] for line in run.steps if line.get("mfu") is not None]
    seconds = sum(line["seconds"] for line in run.steps)
    parts = (sum(line[f"{part}_seconds"] for line in run.steps) / seconds for part in PARTS)
    return [
        run.name,
        *_settings(run.config),
        f"{last['step']:,}",
        "NaN" if last.get("loss") is None else f"{last['loss']:.4f}",
        f"{min(losses):.4f}" if losses else "-",
        f"{statistics.median(line['tokens_per_second'] for line in run.steps):,.0f}",
        f"{statistics.median(mfu):.1%}" if mfu else "-",
        f"{last['peak_memory_bytes'] / 2**30:.1f}",
        f"{last.get('skipped') or 0:.0f}",
        *(f"{part:.1%}" for part in parts),
        _versions(run.config),
    ]


def _settings(config: Mapping[str, Any]) -> list[str]:
    """Return model, devices, rows, attention and precision from config.json; "-" if it lacks them.

    Files of other versions may lack some.
    """
    flags, chosen = (
        value if isinstance(value := config.get(section), dict) else {}
        for section in ("flags", "chosen")
    )
    try:
        devices = math.prod(size for name, size in chosen.items() if name.startswith("mesh."))
        accum = f" in {flags['grad_accum']}" if flags["grad_accum"] > 1 else ""
        stored = f"{flags['param_dtype']} weights"
        if flags.get("lora.rank") or flags.get("lora.adapter"):
            stored = f"LoRA, {flags['base_dtype'] or chosen['dtype']} base"
        fp8 = ", fp8 products" if flags.get("matmul") == "fp8" else ""
        return [
            Path(chosen["model"]).name,
            f"{devices} x {chosen['device']}",
            f"{chosen['batch_size']:,} x {flags['seq_len']:,}{accum}",
            f"{chosen['attn']}, remat {chosen['remat']}",
            f"{chosen['dtype']}, {stored}{fp8}",
        ]
    except (KeyError, TypeError):
        return ["-"] * 5


def _versions(config: Mapping[str, Any]) -> str:
    found = config.get("versions")
    if not isinstance(found, dict):
        return "-"
    commit = f" ({found['commit']})" if found.get("commit") else ""
    return f"{found.get('internlm2-jax')}{commit}, jax {found.get('jax')}"
