"""Measure time, useful rate, memory and error of every implementation: `python -m jaxattn.bench`.

Useful FLOPs count visible query-key pairs only: 4 * N * H per pair forward, 3.5 times that forward
and backward. An implementation that computes hidden pairs gets no credit for them. Each cell runs
in a child process (`jaxattn.bench.cell`). A cell that cannot run is a line with the reason.
"""

import argparse
import importlib.util
import itertools
import math
import sys
import time
from typing import Any

from jaxattn import api
from jaxattn.bench.harness import (
    UNFINISHED,
    Cell,
    check_resumable,
    is_done,
    machine,
    merge,
    output_file,
    picture_file,
    read_cells,
    run_child,
    write_cells,
)
from jaxattn.bench.shapes import FA3, SHAPES, SMOKE, TORCH, shape_of
from jaxattn.bench.table import HEADER, line, plot, table

IMPLEMENTATIONS = (*api.IMPLEMENTATIONS, FA3, *TORCH)


def main(argv: list[str] | None = None) -> int:
    """Run the cells, print and write the table; return 0 if any cell ran, 3 if some are left."""
    args = _parse(argv)
    origin = machine()
    try:
        if args.resume:
            check_resumable(origin)
        cells = read_cells(args.out, origin["device"]) if args.out else []
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(", ".join(origin.values()), HEADER, sep="\n", flush=True)
    wanted = [
        (impl, name)
        for impl, name in itertools.product(args.impls, args.shapes)
        if not (args.resume and is_done(cells, (name, impl), _key, origin))
    ]
    any_ran = len(wanted) < len(args.impls) * len(args.shapes)
    left, begun = 0, time.monotonic()
    for number, (impl, name) in enumerate(wanted):
        if time.monotonic() - begun > 60 * args.minutes:
            left = len(wanted) - number
            break
        another = impl in (later for later, _ in wanted[number + 1 :])
        cell = run_cell(name, impl, check=args.check, another=another) | origin
        any_ran |= "both_ms" in cell
        cells = merge(cells, cell, _key)
        print(line(cell), flush=True)
        if args.out:
            write_cells(cells, args.out)
    print("\n" + table(cells), flush=True)
    if args.plot:
        plot(cells, args.plot)
    if left:
        print(f"{left} cells are left: the same command with --resume goes on")
        return UNFINISHED
    return 0 if any_ran else 1


def _key(cell: Cell) -> list[tuple[str, str]]:
    return [(cell["shape"], cell["impl"])]


def run_cell(name: str, impl: str, *, check: bool, another: bool = False) -> Cell:
    """Measure a shape with an implementation in a child process, and compute the useful rates.

    `another` says that a cell of the same implementation follows; see `run_child`.
    """
    fields: dict[str, Any] = {"shape": name, "impl": impl, "check": check}
    if impl not in TORCH:
        cell = run_child("jaxattn.bench.cell", fields, another=another)
    elif importlib.util.find_spec("torch") is None:
        return {"shape": name, "impl": impl, "why": "PyTorch is not installed (pip install torch)"}
    else:
        # PyTorch uses the GPU: jax must not allocate its memory.
        module, variables = "jaxattn.bench.torch_cell", {"JAX_PLATFORMS": "cpu"}
        cell = run_child(module, fields, environment=variables, another=another)
    if "both_ms" in cell:
        flops = shape_of(name).flops()
        cell["forward_tflops"] = flops / cell["forward_ms"] / 1e9
        cell["both_tflops"] = 3.5 * flops / cell["both_ms"] / 1e9
    return cell


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
        help=f"shapes to run; default: {', '.join(SHAPES)}. On a CPU: {', '.join(SMOKE)}",
    )
    parser.add_argument(
        "--impls",
        nargs="+",
        metavar="IMPL",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        help=f"implementations to run; default: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare o, dq, dk, dv with fp32 and report the errors"
    )
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE.json",
        help="file of the results, written after every cell; cells of earlier calls are kept",
    )
    parser.add_argument(
        "--resume", action="store_true", help="skip cells of --out that this commit has measured"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no cell after this time; the exit status is 3 if cells are left",
    )
    parser.add_argument(
        "--plot", type=picture_file, metavar="FILE.png", help="bar chart of the useful rates"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
