"""The bench's cells in processes of their own: measured one by one, compiled several at a time.

Compiling a step takes longer than timing it, and leaves the GPU idle but for XLA's trials of
matrix products (autotuning). jax keeps what they found beside the compiled steps, so the first cell
is compiled alone, and the others try little, and share the GPU, while they compile together.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from train.bench.shapes import TORCH, Cell

COMPILING = ("compile_seconds", "cache_hits")  # of the child that measures: cold, or from a cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ahead:
    """Cells that are compiled before they are measured."""

    cache: str
    """The directory that has what was compiled."""

    failed: dict[Cell, str]
    """Why, for each that could not be compiled."""


@contextlib.contextmanager
def compiled_ahead(cells: Sequence[Cell], jobs: int) -> Iterator[Ahead]:
    """Compiles ours (not PyTorch's) into one cache: the first alone, then `jobs` at a time.

    A cell that cannot be compiled stops nothing, and one that came before all others is not the
    first: measuring will say why it cannot run.

    Args:
        cells: what will be measured.
        jobs: processes at a time; they take of the GPU's memory only what they need.

    Yields:
        What `run_cell` wants to know. The cache is removed at the end.
    """
    ours = iter([cell for cell in cells if cell.attn not in TORCH])
    failed: dict[Cell, str] = {}
    with _new_cache() as cache:

        def compiles(cell: Cell) -> bool:
            fields, sparing = dataclasses.asdict(cell), {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            said = _run("train.bench.cell", fields, "--compile_only", **_caching(cache), **sparing)
            if "why" in said:
                failed[cell] = said["why"]
            return cell not in failed

        any(map(compiles, ours))  # up to the first that does
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compiles, ours))
        yield Ahead(cache=cache, failed=failed)


def run_cell(cell: Cell, *, cached: bool, ahead: Ahead | None = None) -> dict[str, Any]:
    """Measures in a process of its own, and compiles in a second one.

    Args:
        cell: what to measure.
        cached: whether to start the second.
        ahead: the cell is compiled: there is nothing for a second to find out.

    Returns:
        What `cell.Program.measure` or `torch_cell.measure` returns, and
        cached_compile_seconds with cached_cache_hits, programs found in the cache (or cached_why
        there are none); or the cell's fields and "why" it cannot run. With `ahead` compile_seconds
        is missing: other processes were busy beside it.
    """
    fields = dataclasses.asdict(cell)
    if cell.attn in TORCH:
        if not has_torch():
            return fields | {"why": "PyTorch is not installed (pip install -e '.[torch]')"}
        # The GPU is PyTorch's: jax, which reads the rows, must not take it.
        return _run("train.bench.torch_cell", fields, JAX_PLATFORMS="cpu")
    if ahead is not None:
        found = _run("train.bench.cell", fields, **_caching(ahead.cache))
        compiling = {name: found.pop(name) for name in COMPILING if name in found}
        if compiling and not compiling["cache_hits"]:
            compiling = {"why": ahead.failed.get(cell, "what was compiled ahead was not found")}
        return found | {f"cached_{name}": value for name, value in compiling.items()}
    with _new_cache() as cache:
        found = _run("train.bench.cell", fields, **_caching(cache))
        if cached and "ms" in found:
            same = fields | {"remat": found["remat"]}
            again = _run("train.bench.cell", same, "--compile_only", **_caching(cache))
            found |= {f"cached_{n}": again[n] for n in (*COMPILING, "why") if n in again}
    return found


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def _new_cache() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="internlm2-jax-bench-")


def _caching(cache: str) -> dict[str, str]:
    """Environment in which jax keeps all that it compiles, and what autotuning found, there."""
    return {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _run(module: str, fields: dict[str, Any], *flags: str, **variables: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, json.dumps(fields), *flags]
    environment = dict(os.environ) | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        said = [text for text in done.stderr.splitlines() if text.strip()] or ["nothing"]
        return fields | {"why": f"process ended with {done.returncode}: {said[-1][:300]}"}
