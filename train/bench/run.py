"""Run the bench's cells in child processes: measured one by one, compiled several at a time.

Compiling a step takes longer than timing it, and leaves the GPU idle except for XLA's autotuning of
matrix products. jax caches autotuning results beside the compiled steps. So the first cell is
compiled alone; the other cells tune little and share the GPU while they compile together.
"""

import contextlib
import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxattn.bench import harness
from train.bench.shapes import TORCH, Cell

COMPILING = ("compile_seconds", "cache_hits")  # of a process that compiles: cold, or from a cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledCells:
    """Cells that were compiled before they are measured."""

    cache: str
    """Directory of the compilation cache."""

    failed: dict[Cell, str]
    """Reason for each cell that could not be compiled."""


@contextlib.contextmanager
def compile_first(cells: Sequence[Cell], jobs: int) -> Iterator[CompiledCells]:
    """Compile all cells of jax into one cache: the first alone, then `jobs` at a time.

    A cell that cannot be compiled stops nothing, and the next one is then the first.

    Args:
        cells: cells that will be measured.
        jobs: processes at a time; they allocate only the GPU memory that they need.

    Yields:
        The compiled cells, for `run_cell`. The cache is removed at the end.
    """
    ours = iter([cell for cell in cells if cell.attn not in TORCH])
    failed: dict[Cell, str] = {}
    with _new_cache() as cache:

        def compiles(cell: Cell) -> bool:
            variables = _caching(cache) | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            found = harness.run_child(
                "train.bench.cell",
                dataclasses.asdict(cell),
                "--compile_only",
                environment=variables,
            )
            if "why" in found:
                failed[cell] = found["why"]
            return cell not in failed

        any(map(compiles, ours))  # up to the first that compiles
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compiles, ours))
        yield CompiledCells(cache=cache, failed=failed)


def run_cell(
    cell: Cell, *, cached: bool, compiled: CompiledCells | None = None, another: bool = False
) -> harness.Cell:
    """Measure a cell in a child process, and compile it again in a second one.

    Args:
        cell: the cell.
        cached: True to start the second process.
        compiled: cells of `compile_first`; no second process is needed.
        another: a cell of the same kind, PyTorch or not, follows; see `harness.run_child`.

    Returns:
        The results of `cell.Program.measure` or `torch_cell.measure`, with cached_compile_seconds
        and cached_cache_hits (programs found in the cache), or cached_why; or the cell's fields
        and `why` it cannot run. With `compiled`, compile_seconds is missing: other processes ran at
        the same time.
    """
    fields = dataclasses.asdict(cell)
    if cell.attn in TORCH:
        if why := why_not_installed(cell.attn):
            return fields | {"why": why}
        # PyTorch uses the GPU: jax, which reads the rows, must not allocate its memory.
        module, variables = "train.bench.torch_cell", {"JAX_PLATFORMS": "cpu"}
        return harness.run_child(module, fields, environment=variables, another=another)
    if compiled is not None:
        variables = _caching(compiled.cache)
        found = harness.run_child(
            "train.bench.cell", fields, environment=variables, another=another
        )
        compiling = {name: found.pop(name) for name in COMPILING if name in found}
        if compiling and not compiling["cache_hits"]:
            compiling = {"why": compiled.failed.get(cell, "the compiled step was not in the cache")}
        return found | {f"cached_{name}": value for name, value in compiling.items()}
    with _new_cache() as cache:
        variables = _caching(cache)
        found = harness.run_child("train.bench.cell", fields, environment=variables)
        if cached and "ms" in found:
            same = fields | {"remat": found["remat"]}
            again = harness.run_child(
                "train.bench.cell", same, "--compile_only", environment=variables
            )
            found |= {f"cached_{n}": again[n] for n in (*COMPILING, "why") if n in again}
    return found


def why_not_installed(attn: str) -> str | None:
    """Return which package an implementation of PyTorch lacks; None if it is installed."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed (pip install -e '.[torch]')"
    if attn != "torch_liger":
        return None
    missing = [
        package
        for module, package in (("liger_kernel", "liger-kernel"), ("flash_attn", "flash-attn-4"))
        if importlib.util.find_spec(module) is None
    ]
    names = " ".join(missing)
    return f"{' and '.join(missing)} not installed (pip install {names})" if missing else None


def _new_cache() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="internlm2-jax-bench-")


def _caching(cache: str) -> dict[str, str]:
    """Return the environment in which jax caches every compiled program and tuning result."""
    return {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
