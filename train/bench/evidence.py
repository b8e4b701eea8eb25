"""`python -m train.bench.evidence`: measure all figures of the documentation, in parts.

Each part calls one of the benches of the project with fixed flags and one directory of results. A
part that is called again skips the cells that the same commit has measured, so that a part can be
divided over several calls of some minutes each. `make figures` draws plots and tables from the
files.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from jaxattn.bench import __main__ as attention_bench
from jaxattn.bench import harness
from jaxattn.commit import VARIABLE, commit
from models.cli import fail, parse
from models.files import read_json
from train.bench import __main__ as step_bench

Part = Literal["kernels", "seed", "steps", "steps_liger", "generate", "mesh", "mesh_long"]
PARTS: tuple[Part, ...] = get_args(Part)
ON_TWO: tuple[Part, ...] = ("mesh", "mesh_long")
"""Parts for two GPUs; the others are for one."""

DONE, LEFT, FAILED = "done", "left", "failed"
MESHES = ("fsdp=1", "fsdp=2", "tensor=2", "seq=2")

FILES: dict[Part, str] = {
    "kernels": "kernels.json",
    "seed": "seed/bench.json",
    "steps": "steps/bench.json",
    "steps_liger": "steps/bench.json",
    "generate": "generate.json",
    "mesh": "mesh/bench.json",
    "mesh_long": "mesh_long/bench.json",
}
"""File of each part in --out."""

_STEP = ["--no_cached", "--repeats=3", "--model=internlm2-1.8b", "--jobs=8"]
_ROWS = ["--rows", "dense", "packed", "--seq_lens", "512", "4096", "32768"]
FLAGS: dict[Part, list[str]] = {
    "kernels": [],
    # The comparison that the project began with: one document a row.
    "seed": [*_STEP, "--rows=dense", "--attn", "pallas", "cudnn", "xla", "eager"],
    "steps": [
        *(*_STEP, *_ROWS, "--attn", "pallas", "torch_sdpa", "torch_eager"),
    ],
    # PyTorch at its fastest has no weights and moments in fp32.
    "steps_liger": [
        *(*_STEP, *_ROWS, "--attn=torch_liger"),
        *("--param_dtype=bf16", "--optim.moment_dtype=bf16"),
    ],
    "generate": ["--model=internlm2-1.8b"],
    "mesh": [
        *(*_STEP, "--rows=packed", "--attn=pallas", "--seq_lens=32768"),
        *("--remat=dots", "--mesh", *MESHES),
    ],
    "mesh_long": [
        *(*_STEP, "--rows=packed", "--attn=pallas", "--seq_lens=65536"),
        *("--mesh", "fsdp=1", "seq=2"),
    ],
}
"""Flags of the bench of each part on a GPU."""

_TINY_STEP = ["--no_cached", "--repeats=1", "--model=nano", "--tokens=64", "--seq_lens", "32"]
TINY: dict[Part, list[str]] = {
    "kernels": ["--shapes", "smoke"],
    "seed": [*_TINY_STEP, "64", "--rows=dense", "--attn", "pallas", "cudnn", "xla", "eager"],
    "steps": [*_TINY_STEP, "--rows", "dense", "packed", "--attn", "xla", "torch_sdpa"],
    "steps_liger": [*_TINY_STEP, "--rows=packed", "--attn", "xla", "torch_liger"],
    "generate": ["--model=nano", "--load", "nano", "--prompt=64", "--new=4"],
    "mesh": [*_TINY_STEP, "--rows=packed", "--attn=xla", "--remat=dots", "--mesh", *MESHES],
    "mesh_long": [*_TINY_STEP, "64", "--rows=packed", "--attn=xla", "--mesh", "fsdp=1", "seq=2"],
}
"""The same with shapes for a CPU, which show that the parts run and are no measurement."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """Measure the figures of the documentation, in parts."""

    parts: Annotated[tuple[Part, ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Parts; by default those for one GPU, or on two GPUs those for two. kernels: attention alone,
    all shapes and implementations. seed: time per step against row length for pallas, cudnn, xla
    and eager. steps: whole steps beside PyTorch; steps_liger: PyTorch with Liger
    and FlashAttention-4, bf16 weights and moments. generate: loading and generation. mesh,
    mesh_long: fsdp, tensor and seq on two GPUs."""

    minutes: float = math.inf
    """Begin no cell after this time; cells that are left are for the next call. A cell takes up to
    two minutes."""

    tiny: bool = False
    """Small shapes, which a CPU computes in minutes: a trial of the command."""

    commit: Annotated[str | None, tyro.conf.arg(metavar="HASH")] = None
    """Commit of the code, for a copy that has no git repository."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory of the files; by default results/evidence, of which the documentation is made, and
    runs/evidence_tiny with --tiny."""

    def __post_init__(self):
        """Check the time.

        Raises:
            ValueError: it is not above 0.
        """
        if not self.minutes > 0:
            raise ValueError(f"--minutes={self.minutes} must be above 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; return the exit status.

    Returns:
        0 if all parts are done; 1 if a part failed; 2 for wrong flags, or without a commit; 3 if
        cells are left for another call.
    """
    try:
        config = parse(
            EvidenceConfig, sys.argv[1:] if argv is None else argv, "train.bench.evidence"
        )
    except ValueError as error:
        return fail(error, 2)
    if config.commit is not None:
        os.environ[VARIABLE] = config.commit  # also for the child processes
        commit.cache_clear()
    if commit() is None:
        return fail("there is no git repository here: give --commit=HASH of this code", 2)
    try:
        machine = harness.machine()
    except RuntimeError as error:  # no device
        return fail(error, 1)
    out = config.out or Path("runs/evidence_tiny" if config.tiny else "results/evidence")
    print(", ".join(machine.values()), flush=True)
    on_two = _count(machine["device"]) > 1
    parts = config.parts or tuple(part for part in PARTS if (part in ON_TWO) == on_two)
    begun, states = time.monotonic(), {}
    for part in parts:
        left = config.minutes - (time.monotonic() - begun) / 60
        print(f"\n== {part}: {out / FILES[part]}", flush=True)
        if (part in ON_TWO) != on_two and not config.tiny:
            print("needs two GPUs" if part in ON_TWO else "needs one: CUDA_VISIBLE_DEVICES=0")
            states[part] = FAILED
        else:
            states[part] = LEFT if left <= 0 else _run(part, config, out, machine, left)
    print(f"\nevidence of commit {commit()}: {', '.join(f'{p} {s}' for p, s in states.items())}")
    if FAILED in states.values():
        return 1
    return harness.UNFINISHED if LEFT in states.values() else 0


def _run(
    part: Part, config: EvidenceConfig, directory: Path, machine: dict[str, str], minutes: float
) -> str:
    """Run a part; return its state."""
    flags = (TINY if config.tiny else FLAGS)[part]
    file = directory / FILES[part]
    file.parent.mkdir(parents=True, exist_ok=True)
    if part == "generate":
        return _generate(flags, file, machine)
    bench: Callable[[list[str]], int] = step_bench.main
    out = file.parent
    if part == "kernels":
        bench, out = attention_bench.main, file
    status = bench([*flags, "--resume", f"--minutes={max(minutes, 1e-3):g}", f"--out={out}"])
    return {0: DONE, harness.UNFINISHED: LEFT}.get(status, FAILED)


def _generate(flags: list[str], file: Path, machine: dict[str, str]) -> str:
    """Run the bench of loading and generation, unless this commit has its file."""
    try:
        found = read_json(file) if file.exists() else {}
    except ValueError:  # damaged
        found = {}
    if all(found.get(name) == machine[name] for name in ("commit", "device")):
        print("done before")
        return DONE
    # A process of its own, because it takes the memory of the GPU.
    command = [sys.executable, "-m", "models.bench", *flags, f"--out={file}"]
    if subprocess.run(command).returncode:
        return FAILED
    file.write_text(json.dumps(read_json(file) | machine, indent=1) + "\n")
    return DONE


def _count(device: str) -> int:
    """Return the number of GPUs in the "device" of `harness.machine`."""
    count = device.partition(" x ")[0]
    return int(count) if count.isdecimal() else 1


if __name__ == "__main__":
    sys.exit(main())
