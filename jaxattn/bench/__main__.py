"""Time, useful rate, memory and error of every implementation: `python -m jaxattn.bench`.

Useful FLOPs count visible query-key pairs only: 4 * N * H a pair forward, 3.5 times that for
forward and backward. What an implementation computes beyond them earns nothing. Each
implementation runs in a process of its own (`jaxattn.bench.cell`); what cannot run is a line that
says why.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator

from jaxattn import api
from jaxattn.bench.cell import TORCH
from jaxattn.bench.outputs import output_file, picture_file
from jaxattn.bench.shapes import SHAPES, SMOKE
from jaxattn.bench.table import HEADER, line, plot, table

IMPLEMENTATIONS = (*api.IMPLEMENTATIONS, *TORCH)


def main(argv: list[str] | None = None) -> int:
    """Runs the table and prints it; returns 0 if any cell could run."""
    args = _parse(argv)
    head: dict[str, str] = {"date": datetime.date.today().isoformat()}
    cells: dict[str, dict[str, dict]] = {name: {} for name in args.shapes}
    print(HEADER, flush=True)
    for impl in args.impls:
        for name, machine, cell in run(impl, args.shapes, check=args.check):
            head = machine | head
            if "both_ms" in cell:
                flops = (SHAPES | SMOKE)[name].flops()
                cell["forward_tflops"] = flops / cell["forward_ms"] / 1e9
                cell["both_tflops"] = 3.5 * flops / cell["both_ms"] / 1e9
            cells[name][impl] = cell
            print(line(name, impl, cell), flush=True)
            if args.out:  # after every cell, so that a run that is cut off keeps what it has
                flat = {f"{n}/{i}": cell for n, row in cells.items() for i, cell in row.items()}
                args.out.write_text(json.dumps({**head, "cells": flat}, indent=1) + "\n")
    print("\n" + " ".join(f"{key}={value}" for key, value in head.items()))
    print(table(cells), flush=True)
    if args.plot:
        plot(cells, head, args.plot)
    return 0 if any("both_ms" in cell for row in cells.values() for cell in row.values()) else 1


def run(impl: str, names: list[str], *, check: bool) -> Iterator[tuple[str, dict, dict]]:
    """Yields (shape, machine, cell) as the cells of an implementation become known.

    A process that dies costs the cell it was at; another one goes on behind it.
    """
    rest = list(names)
    while rest:
        command = [sys.executable, "-m", "jaxattn.bench.cell", impl, *rest]
        environment = dict(os.environ)
        if impl in TORCH:
            environment["JAX_PLATFORMS"] = "cpu"  # the GPU is torch's
        with subprocess.Popen(
            command + ["--check"] * check,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            machine: dict[str, str] | None = None
            for text in process.stdout or ():
                if not text.startswith("{"):  # something else that a library says
                    sys.stderr.write(text)
                elif machine is None:
                    machine = json.loads(text)
                else:
                    yield rest.pop(0), machine, json.loads(text)
        if rest:
            why = f"its process ended with code {process.returncode}; see what it said above"
            yield rest.pop(0), machine or {}, {"why_not": why}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxattn.bench", description="Time every attention implementation."
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        choices=SHAPES | SMOKE,
        default=list(SHAPES),
        help=f"what to run, by default all of {', '.join(SHAPES)}; also {', '.join(SMOKE)}, which "
        "a CPU can run",
    )
    parser.add_argument(
        "--impls",
        nargs="+",
        metavar="IMPL",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        help=f"by default all: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument(
        "--check", action="store_true", help="errors of o, dq, dk, dv against fp32 as well"
    )
    parser.add_argument(
        "--out", type=output_file, metavar="FILE.json", help="written after every cell"
    )
    parser.add_argument(
        "--plot", type=picture_file, metavar="FILE.png", help="useful rates as bars"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
