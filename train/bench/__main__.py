"""`python -m train.bench`: time whole training steps by model, length, attention and remat.

Each cell runs in a child process (`train.bench.run` starts `train.bench.cell` or
`train.bench.torch_cell`): a cell that cannot run is a line with the reason, and the bench goes on.
Tokens per step are the same in every cell, as far as rows allow. Several calls with the same --out
make one table: a cell that is measured again replaces the old one.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxattn.bench import harness
from models.cli import fail, parse
from models.config import PRESETS
from models.remat import parse_remat
from train.bench.run import compile_first, run_cell, why_not_installed
from train.bench.shapes import TORCH, Cell, RowKind, parse_mesh
from train.bench.table import HEADER, key, line, read, write
from train.config.sections import chosen

ON_GPU = {
    "model": ("internlm2-1.8b",),
    "tokens": 32_768,
    "seq_lens": (512, 2048, 4096, 8192, 16384, 32768),
}
ON_CPU = {"model": ("nano",), "tokens": 1_024, "seq_lens": (128, 256, 512)}
OURS = ("pallas", "cudnn", "xla", "eager")
Attn = Literal[
    "pallas", "pallas_mma", "cudnn", "xla", "eager", "torch_sdpa", "torch_eager", "torch_liger"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptim:
    """Optimizer, as in train.main."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """Optimizer."""

    moment_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Dtype of adamw's two moments."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time the training step of a model with random weights."""

    model: Annotated[tuple[str, ...] | None, chosen("NAME...")] = None
    """Presets. By default internlm2-1.8b on a GPU, else nano."""

    attn: Annotated[tuple[Attn, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Implementations: the columns of the table. torch_sdpa, torch_eager and torch_liger (Liger's
    kernels and FlashAttention-4) are transformers' Llama of the same shape. By default all that are
    installed, but pallas_mma."""

    rows: tuple[RowKind, ...] = ("dense", "packed")
    """Content of a row. dense: one document of random tokens; packed: documents of random tokens
    with log-normal length, median 1,500; data: documents of --data."""

    data: Annotated[tuple[str, ...], chosen("FILE...")] = ()
    """Files for --rows=data, read and packed as in train.main."""

    tokenizer: str = "byte"
    """Tokenizer of --data, as in train.main."""

    seq_lens: Annotated[tuple[int, ...] | None, chosen("INT...")] = None
    """Row lengths in tokens. By default 512 2048 4096 8192 16384 32768 on a GPU, less elsewhere."""

    mesh: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MESH...", help_behavior_hint="")] = ()
    """Device meshes, such as fsdp=1 fsdp=8 fsdp=4,tensor=2, each on as many of the devices as it
    needs; the table compares them. By default fsdp over all devices."""

    tokens: Annotated[int | None, chosen("INT")] = None
    """Tokens of a step per GPU: rows = tokens / seq_len. By default 32,768 on a GPU, less
    elsewhere."""

    remat: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Rematerialization policies, as in train.main. By default the fastest that fits."""

    scan_layers: Annotated[bool | None, chosen("{True,False}")] = None
    """Compile one layer for all layers, as in train.main."""

    tile_size: Annotated[int | None, chosen("INT")] = None
    """Most tokens of a row for which matrix products are computed at once, as in train.main."""

    dtype: Annotated[Literal["bfloat16", "float32"] | None, chosen("{bfloat16,float32}")] = None
    """Compute dtype. By default bfloat16 on a GPU, else float32."""

    matmul: Literal["bf16", "fp8"] = "bf16"
    """Matrix products of the blocks, as in train.main."""

    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the stored weights. PyTorch computes under autocast with fp32."""

    lora_rank: Annotated[int | None, chosen("INT")] = None
    """Rank of LoRA adapters on all linear layers of the blocks. By default all weights are
    trained."""

    base_dtype: Annotated[
        Literal["fp32", "bf16", "nf4", "int8"] | None, chosen("fp32|bf16|nf4|int8")
    ] = None
    """Storage of the frozen weights beside adapters, as in train.main."""

    optim: BenchOptim = dataclasses.field(default_factory=BenchOptim)

    grad_accum: int = 1
    """Microbatches of a step, as in train.main; the tokens of a step stay."""

    z_loss: float = 0.0
    """Factor of the z-loss, as in train.main."""

    deterministic: bool = False
    """Bitwise reproducible steps, as in train.main."""

    repeats: int = 3
    """Timed runs of a cell after a warm-up; the median counts. A run is 3 steps, or one step if a
    step takes longer than 2 s."""

    jobs: int = 1
    """Above 1: compile all cells before the first is measured, this many at a time. Cold compile
    times are then not measured."""

    cached: bool = True
    """Compile again in a second process, from the compilation cache of the first, and report that
    time. With --jobs above 1 the first process reports it."""

    resume: bool = False
    """Skip the cells of --out that this commit has measured on this machine."""

    minutes: float = math.inf
    """Begin no cell after this time. The exit status is 3 if cells are left."""

    out: Path = Path("runs/bench")
    """Directory of bench.json, table.md and the plots; cells of earlier calls are kept."""

    def __post_init__(self):
        """Check values that would fail in every cell.

        Raises:
            ValueError: names the flag.
        """
        for value in self.model or ():
            if value not in PRESETS:
                raise ValueError(f"--model={value} must be one of {', '.join(PRESETS)}")
        for value in self.remat:
            parse_remat(value, flag="--remat")
        for flag in ("repeats", "grad_accum"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag}={getattr(self, flag)} must be at least 1")
        for text in self.mesh:
            parse_mesh(text)
        if not self.minutes > 0:
            raise ValueError(f"--minutes={self.minutes} must be above 0")
        if self.jobs < 1:
            raise ValueError(f"--jobs={self.jobs} must be at least 1: 1 compiles no cell ahead")
        if ("data" in self.rows) != bool(self.data):
            raise ValueError("--rows=data and --data=FILE go together: give both or neither")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the cells, print and write the table; return the exit status."""
    try:
        config = parse(BenchConfig, sys.argv[1:] if argv is None else argv, "train.bench")
        machine = harness.machine()
        if config.resume:
            harness.check_resumable(machine)
        found = read(config.out, machine["device"])
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except RuntimeError as error:  # no device
        return fail(error, 1)
    print(", ".join(machine.values()), flush=True)
    if not config.attn:
        for attn in TORCH:
            if why := why_not_installed(attn):
                print(f"without {attn}: {why}")
    cells = list(cells_of(config, on_gpu=machine["device"] != "cpu"))
    begun, count = time.monotonic(), len(cells)
    if config.resume:
        wanted = [cell for cell in cells if not _is_done(found, cell, machine)]
        print(f"{len(cells) - len(wanted)} of {len(cells)} cells are done", flush=True)
        if not wanted:
            return 0
        cells = wanted
    any_ran, left = len(cells) < count, 0
    with contextlib.ExitStack() as stack:
        compiled = None
        if config.jobs > 1:
            print(f"compiling the cells first, {config.jobs} at a time", flush=True)
            compiled = stack.enter_context(compile_first(cells, config.jobs))
        print(HEADER, flush=True)
        for number, cell in enumerate(cells):
            if time.monotonic() - begun > 60 * config.minutes:
                left = len(cells) - number
                break
            another = (cell.attn in TORCH) in ((c.attn in TORCH) for c in cells[number + 1 :])
            new = run_cell(cell, cached=config.cached, compiled=compiled, another=another) | machine
            any_ran |= "ms" in new
            found = harness.merge(found, new, key)
            write(found, config.out)  # after every cell: an interrupted bench keeps its results
            print(line(new), flush=True)
    print(f"wrote {config.out}/bench.json, table.md and plots, {len(found)} cells in all")
    if left:
        print(f"{left} cells are left: the same command with --resume goes on")
        return harness.UNFINISHED
    return 0 if any_ran else 1


def _is_done(found: list[harness.Cell], cell: Cell, machine: dict[str, str]) -> bool:
    wanted = next(iter(key(dataclasses.asdict(cell) | {"data": [*cell.data]})))
    return harness.is_done(found, wanted, key, machine)


def cells_of(config: BenchConfig, *, on_gpu: bool) -> Iterator[Cell]:
    """Yield the cells of the flags, implementation by implementation."""
    defaults: dict[str, Any] = ON_GPU if on_gpu else ON_CPU
    attns = config.attn or (*OURS, *(attn for attn in TORCH if not why_not_installed(attn)))
    for model, rows, attn, seq_len, remat, mesh in itertools.product(
        config.model or defaults["model"],
        config.rows,
        attns,
        config.seq_lens or defaults["seq_lens"],
        config.remat or (None,),
        config.mesh or (None,),
    ):
        yield Cell(
            mesh=mesh,
            model=model,
            attn=attn,
            seq_len=seq_len,
            tokens=config.tokens or defaults["tokens"],
            rows=rows,
            remat=remat,
            scan_layers=config.scan_layers,
            tile_size=config.tile_size,
            dtype=config.dtype or ("bfloat16" if on_gpu else "float32"),
            matmul=config.matmul,
            param_dtype=config.param_dtype,
            lora_rank=config.lora_rank,
            base_dtype=config.base_dtype,
            optim=config.optim.name,
            state=config.optim.moment_dtype,
            grad_accum=config.grad_accum,
            z_loss=config.z_loss,
            deterministic=config.deterministic,
            repeats=config.repeats,
            data=config.data if rows == "data" else (),
            tokenizer=config.tokenizer,
        )


if __name__ == "__main__":
    sys.exit(main())
