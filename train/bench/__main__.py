"""`python -m train.bench`: the whole training step, per model, length, attention and remat.

Each cell runs in a process of its own (`train.bench.run` starts `train.bench.cell` or
`train.bench.torch_cell`), so one that cannot run is a line that says why, and the table goes on.
Tokens per step are the same in every cell, as far as rows allow. Several calls with the same --out
make one table: what is measured again is replaced, the rest is kept.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from models.config import PRESETS
from models.remat import REMAT
from train.bench.run import compiled_ahead, has_torch, run_cell
from train.bench.shapes import TORCH, Cell, RowKind
from train.bench.table import HEADER, line, merged, read, write
from train.config.cli import fail, parse

ON_GPU = {
    "model": ("internlm2-1.8b",),
    "tokens": 32_768,
    "seq_lens": (512, 2048, 4096, 8192, 16384, 32768),
}
ON_CPU = {"model": ("nano",), "tokens": 1_024, "seq_lens": (128, 256, 512)}
OURS = ("pallas", "cudnn", "xla", "eager")
CPU = "cpu"  # what stands for the device where there is no GPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptim:
    """As in train.main."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """Optimizer."""

    moment_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """What adamw stores its two moments in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Times the training step of a model with random weights."""

    model: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="NAME...", help_behavior_hint="")
    ] = None
    """Presets. By default internlm2-1.8b on a GPU, else nano."""

    attn: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="NAME...", help_behavior_hint="")
    ] = None
    """Implementations: the columns of the table. By default pallas, cudnn, xla, eager, and where
    PyTorch is installed torch_sdpa and torch_eager: transformers' Llama of the same shape."""

    rows: tuple[RowKind, ...] = ("dense", "packed")
    """What is in a row: one document (dense); documents of log-normal length, median 1,500 (packed;
    both random tokens); or documents of --data."""

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE...", help_behavior_hint="")] = ()
    """Files for --rows=data, packed and read as in train.main."""

    tokenizer: str = "byte"
    """For --data, as in train.main."""

    seq_lens: Annotated[
        tuple[int, ...] | None, tyro.conf.arg(metavar="INT...", help_behavior_hint="")
    ] = None
    """Tokens of a row. By default 512 2048 4096 8192 16384 32768 on a GPU, less elsewhere."""

    tokens: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None
    """Of a step, per GPU: rows = tokens / seq_len. By default 32,768 on a GPU, less elsewhere."""

    remat: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """What the backward pass finds in memory, as in train.main. By default the fastest that
    fits."""

    scan_layers: bool = False
    """Compile one block for all layers, as in train.main."""

    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        tyro.conf.arg(metavar="bfloat16|float32", help_behavior_hint=""),
    ] = None
    """Compute type. By default bfloat16 on a GPU, else float32."""

    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """What weights are stored in. PyTorch's with fp32 compute under autocast."""

    optim: BenchOptim = dataclasses.field(default_factory=BenchOptim)

    repeats: int = 3
    """Timed runs of a cell, after some steps to warm up; their median counts. A run is 3 steps, or
    one where a step takes longer than 2 s."""

    jobs: int = 1
    """Above 1: compile all cells before the first is measured, so many at a time. What is measured
    then comes from their cache, and no cold compile time is known."""

    cached: bool = True
    """Compile once more, in a second process, from the compilation cache of the first. With --jobs
    above 1 none is needed."""

    out: Path = Path("runs/bench")
    """Where bench.json, table.md and the plots go; cells of earlier calls are kept."""

    def __post_init__(self):
        """Checks what would otherwise fail in every cell.

        Raises:
            ValueError: naming the flag.
        """
        for flag, values, known in (
            ("model", self.model or (), PRESETS),
            ("attn", self.attn or (), (*OURS, *TORCH)),
            ("remat", self.remat, REMAT),
        ):
            for value in values:
                if value not in known:
                    raise ValueError(f"--{flag}={value} must be one of {', '.join(known)}")
        if self.repeats < 1:
            raise ValueError(f"--repeats={self.repeats} must be at least 1")
        if self.jobs < 1:
            raise ValueError(f"--jobs={self.jobs} must be at least 1: 1 compiles no cell ahead")
        if ("data" in self.rows) != bool(self.data):
            raise ValueError("--rows=data and --data=FILE go together: give both or neither")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the table; returns the exit status."""
    try:
        config = parse(BenchConfig, sys.argv[1:] if argv is None else argv, "train.bench")
        machine = _machine()
        found = read(config.out / "bench.json", machine["device"])
    except ValueError as error:
        return fail(error, 2)
    print(", ".join(machine.values()), flush=True)
    if config.attn is None and not has_torch():
        print("without PyTorch's columns: it is not installed (pip install -e '.[torch]')")
    cells = list(cells_of(config, on_gpu=machine["device"] != CPU))
    any_ran = False
    with contextlib.ExitStack() as stack:
        ahead = None
        if config.jobs > 1:
            print(f"compiling the cells first, {config.jobs} at a time", flush=True)
            ahead = stack.enter_context(compiled_ahead(cells, config.jobs))
        print(HEADER, flush=True)
        for cell in cells:
            new = run_cell(cell, cached=config.cached, ahead=ahead) | machine
            any_ran |= "ms" in new
            found = merged(found, new)
            write(found, config.out)  # after every cell: what is cut off keeps what it has
            print(line(new), flush=True)
    print(f"wrote {config.out}/bench.json, table.md and plots, {len(found)} cells in all")
    return 0 if any_ran else 1


def cells_of(config: BenchConfig, *, on_gpu: bool) -> Iterator[Cell]:
    """The cells that were asked for, implementation by implementation."""
    chosen: dict[str, Any] = ON_GPU if on_gpu else ON_CPU
    attns = config.attn or ((*OURS, *TORCH) if has_torch() else OURS)
    for model, rows, attn, seq_len, remat in itertools.product(
        config.model or chosen["model"],
        config.rows,
        attns,
        config.seq_lens or chosen["seq_lens"],
        config.remat or (None,),
    ):
        yield Cell(
            model=model,
            attn=attn,
            seq_len=seq_len,
            tokens=config.tokens or chosen["tokens"],
            rows=rows,
            remat=remat,
            scan_layers=config.scan_layers,
            dtype=config.dtype or ("bfloat16" if on_gpu else "float32"),
            param_dtype=config.param_dtype,
            optim=config.optim.name,
            state=config.optim.moment_dtype,
            repeats=config.repeats,
            data=config.data if rows == "data" else (),
            tokenizer=config.tokenizer,
        )


def _machine() -> dict[str, str]:
    """Device and versions, asked in another process: this one must not hold the GPU."""
    code = (
        "import jax, json; d = jax.devices(); print(json.dumps({'device': "
        "f'{len(d)} x {d[0].device_kind}' if d[0].platform == 'gpu' else d[0].platform, 'versions':"
        " f'jax {jax.__version__}, {d[0].client.platform_version.splitlines()[0]}'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"date": f"{datetime.date.today()}"}


if __name__ == "__main__":
    sys.exit(main())
