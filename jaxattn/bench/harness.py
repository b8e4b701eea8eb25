"""Bench harness: child processes, timing, results file and tables, for every bench of the project.

A *cell* is a dict: the fields that identify a measurement, and its results; or a `why` that names
the reason why it could not run. The harness is used in three places:

1. The command of a bench calls `machine()` once, then `run_child(module, fields)` for each cell.
   Each cell runs in a new process: it has the whole memory of the GPU, its own peak, and may die
   without taking the table with it.
2. The module of the child reads `child_fields()` and calls `report(measure, fields)`, which prints
   the cell as one line of JSON. `milliseconds` times a function. With `another`, the process of the
   next cell imports its modules while this cell is measured; it waits in `child_fields`.
3. The command merges each cell into the results of earlier calls: `read_cells`, `merge` after each
   cell, `write_cells` after each cell (an interrupted bench keeps its results). `text_table` and
   `markdown_table` format rows.

`output_file` and `picture_file` are argparse types for the paths of results.
"""

import argparse
import atexit
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxattn.commit import VARIABLE, commit
from jaxattn.errors import first_line, is_out_of_memory

Cell = dict[str, Any]

UNFINISHED = 3  # exit status of a bench that has cells left for another call
ENDED = "process ended"  # beginning of the reason of a cell whose process gave none


def run_child(
    module: str,
    fields: Cell,
    *flags: str,
    environment: Mapping[str, str] = MappingProxyType({}),
    another: bool = False,
) -> Cell:
    """Run `python -m module flags` and return the cell that it prints last.

    The module reads `child_fields` from its standard input and calls `report`. `environment` adds
    variables to that of the process. `another` says that a call with the same module, flags and
    environment follows: its process starts now, imports its modules, and waits for its fields.

    Returns:
      The cell; `fields` with `why` if the process ended without one.
    """
    global _next
    start = (module, flags, tuple(environment.items()))
    process = None
    if _next is not None and _next[0] == start:
        process, _next = _next[1], None
    process = process or _start(*start)
    if another:
        _stop_next()
        _next = start, _start(*start)
    try:
        stdout, stderr = process.communicate(json.dumps(fields) + "\n")
    except BaseException:  # Ctrl-C
        process.kill()
        raise
    try:
        return json.loads(stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        lines = [line for line in stderr.splitlines() if line.strip()] or ["no message"]
        return fields | {"why": f"{ENDED} with {process.returncode}: {lines[-1][:300]}"}


def child_fields() -> Cell:
    """Return the fields, JSON on standard input, that `run_child` passed to this process."""
    line = sys.stdin.readline()
    if not line:  # the bench has ended and needs no other process
        sys.exit()
    return json.loads(line)


Start = tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]]
_next: tuple[Start, subprocess.Popen[str]] | None = None  # the process of the next cell


def _start(
    module: str, flags: tuple[str, ...], environment: tuple[tuple[str, str], ...]
) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=os.environ | dict(environment),
    )


@atexit.register
def _stop_next() -> None:
    """End the process of a next cell that did not come."""
    global _next
    if _next is not None:
        _next[1].kill()
        _next[1].communicate()
        _next = None


def report(
    measure: Callable[[], Cell],
    fields: Cell,
    *,
    out_of_memory: Callable[[], str] = lambda: "out of device memory",
) -> None:
    """Call `measure` and print `fields` with its results, or with `why`, as a line of JSON.

    `out_of_memory` returns the reason if jax runs out of memory.
    """
    try:
        results = measure()
    except (ValueError, NotImplementedError, OSError) as error:
        results = {"why": first_line(error)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        results = {"why": out_of_memory()}
    print(json.dumps(fields | results), flush=True)


def machine() -> dict[str, str]:
    """Return device, versions, date and commit, by asking a child process for the device.

    This process must not hold a GPU.

    Returns:
      device: "cpu", or the number and kind of the GPUs; versions of jax, its backend and, of a GPU,
      the driver; date; commit, where it is known.

    Raises:
      RuntimeError: jax finds no device.
    """
    code = (
        "import jax, json; d = jax.devices(); print(json.dumps({'device': "
        "f'{len(d)} x {d[0].device_kind}' if d[0].platform == 'gpu' else d[0].platform, 'versions':"
        " f'jax {jax.__version__}, {d[0].client.platform_version.splitlines()[0]}'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"jax finds no device: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["device"] != "cpu" and (driver := _driver()):
        found["versions"] += f", driver {driver}"
    found["date"] = f"{datetime.date.today()}"
    return found | ({"commit": code} if (code := commit()) else {})


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, or None."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.split()), None)


def milliseconds(run: Callable[[], object], wait: Callable[[object], object]) -> float:
    """Return the median over 5 repeats of the mean time of back-to-back launches.

    The launches of all repeats fill half a second. Slower work is launched once in each of 3
    repeats. `run` launches the work without waiting for it, `wait` waits for its result.
    """
    for _ in range(2):  # compile, fill caches; the second time is an estimate
        begin = time.perf_counter()
        wait(run())
    took = time.perf_counter() - begin
    repeats = 5 if took < 0.5 else 3
    launches = max(1, round(0.5 / repeats / took))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(launches):
            out = run()
        wait(out)
        times.append((time.perf_counter() - begin) / launches * 1e3)
    return statistics.median(times)


def read_cells(path: pathlib.Path, device: str) -> list[Cell]:
    """Read the cells that earlier calls wrote; none if there is no file.

    The device is `machine()["device"]` of the new cells.

    Raises:
      ValueError: the file has another content, or cells of another device.
    """
    if not path.exists():
        return []
    try:
        cells = json.loads(path.read_text())["cells"]
        others = {cell["device"] for cell in cells} - {device}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of this bench: {error!r}; choose another --out") from error
    if others:
        raise ValueError(f"{path} is of {', '.join(others)}, not {device}: choose another --out")
    return cells


def merge(cells: list[Cell], new: Cell, key: Callable[[Cell], Iterable[object]]) -> list[Cell]:
    """Append a cell, and remove the cells that it replaces.

    `key` returns the keys of a cell; the new cell replaces cells whose first key is one of its own.
    """
    replaced = list(key(new))
    return [cell for cell in cells if next(iter(key(cell))) not in replaced] + [new]


def check_resumable(origin: Cell) -> None:
    """Raise ValueError if `origin`, from `machine`, has no commit to compare cells with."""
    if "commit" not in origin:
        raise ValueError(f"--resume needs the commit of the code: set {VARIABLE}=HASH")


def is_done(
    cells: list[Cell], wanted: object, key: Callable[[Cell], Iterable[object]], origin: Cell
) -> bool:
    """Return True if a cell has been measured, or cannot run, on the machine and commit of now.

    Processes that ended without a reason, and packages that were missing, are tried again. So is
    everything where files have changed since the commit.

    Args:
      cells: cells of earlier calls.
      wanted: first key of the cell.
      key: as for `merge`.
      origin: from `machine`; nothing is done where it has no commit.
    """
    same = [cell for cell in cells if wanted in key(cell)]
    return not origin.get("commit", "").endswith("-dirty") and any(
        cell.get("commit") == origin.get("commit", "")
        and cell["device"] == origin["device"]
        and not cell.get("why", "").startswith(ENDED)
        and "not installed" not in cell.get("why", "")
        for cell in same
    )


def write_cells(cells: list[Cell], path: pathlib.Path) -> None:
    """Write the cells as JSON; a kill leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
    partial.replace(path)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as text with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a Markdown table; the first row is the header."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def output_file(text: str) -> pathlib.Path:
    """Return a path that can be written; an argparse type.

    Raises:
      argparse.ArgumentTypeError: its directory does not exist, or the path is a directory.
    """
    path = pathlib.Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory, must be a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent} is no directory: make it first")
    return path


def picture_file(text: str) -> pathlib.Path:
    """Return an `output_file` in a format that matplotlib draws; an argparse type.

    Raises:
      argparse.ArgumentTypeError: matplotlib does not draw this format, or is not installed.
    """
    path = output_file(text)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"plots need matplotlib: {error}") from error
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"{path} must end in one of .{', .'.join(sorted(known))}")
    return path
