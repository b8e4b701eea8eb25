"""`python -m train.bench`: the whole training step, per attention implementation and length.

Each cell runs in a process of its own (`train.bench_cell`), so one that cannot run is a line that
says why, and the table goes on. Tokens per step are the same in every cell, as far as rows allow.
"""

import dataclasses
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from models.config import PRESETS
from models.remat import REMAT
from train.bench_cell import Cell
from train.cli import fail, parse

ON_GPU = {"model": "internlm2-1.8b", "tokens": 32_768, "seq_lens": (512, 4096, 16384, 32768)}
ON_CPU = {"model": "nano", "tokens": 1_024, "seq_lens": (128, 256, 512)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Times the training step of a model with random weights, on random tokens."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Preset. By default internlm2-1.8b on a GPU, else nano."""

    attn: tuple[str, ...] = ("pallas", "cudnn", "xla", "eager")
    """Implementations: the columns of the plot."""

    seq_lens: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(metavar="INT...", help_behavior_hint="")
    ] = None
    """Tokens of a row. By default 512 4096 16384 32768 on a GPU, less elsewhere."""

    tokens: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Of a step, per GPU: rows = tokens / seq_len. By default 32,768 on a GPU, less elsewhere."""

    packed: bool = False
    """Pack rows with documents of log-normal length (median 1,500) instead of one a row."""

    remat: str = "dots"
    """What the backward pass finds in memory, as in train.main."""

    scan_layers: bool = False
    """Compile one block for all layers, as in train.main."""

    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        tyro.conf.arg(metavar="bfloat16|float32", help_behavior_hint=""),
    ] = None
    """Compute type. By default bfloat16 on a GPU, else float32."""

    repeats: int = 5
    """Timed runs of 3 steps of a cell, after one to warm up; their median counts."""

    out: Path = Path("runs/bench")
    """Where <model>[-packed].json and .png go."""

    def __post_init__(self):
        """Checks what would otherwise fail in every cell.

        Raises:
            ValueError: naming the flag.
        """
        if self.model is not None and self.model not in PRESETS:
            raise ValueError(f"--model={self.model} must be one of {', '.join(PRESETS)}")
        if self.remat not in REMAT:
            raise ValueError(f"--remat={self.remat} must be one of {', '.join(REMAT)}")
        if self.repeats < 1:
            raise ValueError(f"--repeats={self.repeats} must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the table; returns the exit status."""
    try:
        config = parse(BenchConfig, sys.argv[1:] if argv is None else argv, "train.bench")
    except ValueError as error:
        return fail(error, 2)
    machine = _machine()
    chosen = ON_GPU if machine["platform"] == "gpu" else ON_CPU
    model = config.model or chosen["model"]
    dtype = config.dtype or ("bfloat16" if machine["platform"] == "gpu" else "float32")
    print(f"{model} on {machine['device']}, {machine['versions']}, {machine['date']}", flush=True)
    print(HEADER, flush=True)
    cells = []
    for seq_len in config.seq_lens or chosen["seq_lens"]:
        for attn in config.attn:
            cell = Cell(
                model=model,
                attn=attn,
                seq_len=seq_len,
                tokens=config.tokens or chosen["tokens"],
                packed=config.packed,
                remat=config.remat,
                scan_layers=config.scan_layers,
                dtype=dtype,
                repeats=config.repeats,
            )
            cells.append(run_cell(cell))
            print(row(cells[-1]), flush=True)
    name = f"{model}{'-packed' if config.packed else ''}"
    config.out.mkdir(parents=True, exist_ok=True)
    table = config.out / f"{name}.json"
    table.write_text(json.dumps(machine | {"cells": cells}, indent=1) + "\n")
    plot(cells, machine, config.out / f"{name}.png")
    print(f"wrote {table} and {table.with_suffix('.png')}")
    return 0 if any("ms" in cell for cell in cells) else 1


def run_cell(cell: Cell) -> dict[str, Any]:
    """Measures in a process of its own.

    Returns:
        What `bench_cell.measure` returns, or the cell's fields and "why" it cannot run.
    """
    fields = dataclasses.asdict(cell)
    command = [sys.executable, "-m", "train.bench_cell", json.dumps(fields)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        return fields | {"why": f"process ended with {done.returncode}: {said[-1][:300]}"}


HEADER = (
    f"{'seq_len':>8} {'rows':>5} {'attention':<10} {'ms/step':>10} {'tokens/s':>10} {'MFU':>6} "
    f"{'peak GiB':>9} {'compile s':>9}"
)


def row(cell: dict[str, Any]) -> str:
    """A line of the table."""
    name = f"{cell['attn']:<10}"
    if "why" in cell:
        return f"{cell['seq_len']:>8} {'':>5} {name} cannot run: {cell['why']}"
    mfu = f"{cell['mfu']:.1%}" if "mfu" in cell else "-"
    return (
        f"{cell['seq_len']:>8} {cell['rows']:>5} {name} {cell['ms']:>10.1f} "
        f"{cell['tokens_per_second']:>10,.0f} {mfu:>6} {cell['peak_memory_bytes'] / 2**30:>9.1f} "
        f"{cell['compile_seconds']:>9.1f}"
    )


def plot(cells: list[dict[str, Any]], machine: dict[str, str], path: Path) -> None:
    """Draws step time against sequence length, a line per implementation."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for attn in dict.fromkeys(cell["attn"] for cell in cells):
        points = sorted((c["seq_len"], c["ms"]) for c in cells if c["attn"] == attn and "ms" in c)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=attn)
            axes.legend()
    lengths = sorted({cell["seq_len"] for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("{x:,.0f}")
    axes.set(xlabel="sequence length", ylabel="ms per training step")
    axes.set_title(
        f"{cells[0]['model']}{', packed' if cells[0]['packed'] else ''}, {cells[0]['tokens']:,} "
        f"tokens a step\n{machine['device']}, {machine['versions']}, {machine['date']}",
        fontsize=9,
    )
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def _machine() -> dict[str, str]:
    """Device and versions, asked in another process: this one must not hold the GPU."""
    code = (
        "import jax, jaxlib, json; d = jax.devices(); print(json.dumps({'platform': d[0].platform,"
        "'device': f'{len(d)} x {d[0].device_kind}',"
        "'versions': f'jax {jax.__version__}, {d[0].client.platform_version.splitlines()[0]}'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"date": f"{datetime.date.today()}"}


if __name__ == "__main__":
    sys.exit(main())
