"""Cells run in child processes; with several jobs they are compiled first, into one cache."""

import dataclasses
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.train.cells import CELL
from train.bench import run as bench_run

CELLS = [dataclasses.replace(CELL, seq_len=length) for length in (8, 16, 32, 64, 128)]


def test_a_process_that_dies_is_a_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert bench_run.run_cell(CELL, cached=True)["why"] == "process ended with 1: no message"
    with bench_run.compile_first([CELL], 2) as ahead:
        assert ahead.failed == {CELL: "process ended with 1: no message"}


class Children:
    """Replace the child processes, and record them.

    Attributes:
        calls: (seq_len, flags, environment) in the order in which they began.
        together: for each, how many ran at the same time, itself included.
        result: what a measuring process returns.
    """

    def __init__(self, *, refused=(), group=1):
        """`refused` lengths have a why. After the first, `group` of them wait for each other."""
        self.calls, self.together, self.result = [], [], {"ms": 1.0}
        self._refused, self._barrier = refused, threading.Barrier(group, timeout=30)
        self._running, self._compiled, self._lock = 0, False, threading.Lock()

    def __call__(self, module, fields, *flags, environment=None, another=False):
        """Replace `harness.run_child`."""
        length, in_group = fields["seq_len"], self._compiled
        with self._lock:
            self.calls.append((length, flags, environment))
            self._running += 1
        if in_group:
            self._barrier.wait()  # all have begun
        else:
            time.sleep(0.2)  # enough for others to begin, if they do not wait
        self.together.append(self._running)
        if in_group:
            self._barrier.wait()  # all have counted
        with self._lock:
            self._running -= 1
        if length in self._refused:
            return fields | {"why": f"not {length}"}
        self._compiled = True
        return {"compile_seconds": 9.0, "cache_hits": 0} if flags else self.result


def use(monkeypatch, **how) -> Children:
    """Replace the child processes."""
    children = Children(**how)
    monkeypatch.setattr(bench_run.harness, "run_child", children)
    return children


def test_the_first_is_alone_and_then_two_at_a_time(monkeypatch):
    """All into one cache, which is there until the end, and without taking the whole GPU."""
    children = use(monkeypatch, group=2)
    torch = dataclasses.replace(CELL, attn="torch_sdpa")
    with bench_run.compile_first([torch, *CELLS], 2) as ahead:
        assert Path(ahead.cache).is_dir() and ahead.failed == {}
    assert not Path(ahead.cache).exists()
    assert children.together == [1, 2, 2, 2, 2]
    lengths = [length for length, *_ in children.calls]
    assert lengths[0] == 8 and sorted(lengths) == [8, 16, 32, 64, 128]
    for _, flags, variables in children.calls:
        assert flags == ("--compile_only",)
        assert variables["JAX_COMPILATION_CACHE_DIR"] == ahead.cache
        assert variables["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_one_that_does_not_compile_is_not_the_first(monkeypatch):
    """Nor does it stop the others: the next one is alone, for what it leaves in the cache."""
    children = use(monkeypatch, refused=(8,), group=3)
    with bench_run.compile_first(CELLS, 3) as ahead:
        assert ahead.failed == {CELLS[0]: "not 8"}
    assert children.together == [1, 1, 3, 3, 3]


def test_none_compiles(monkeypatch):
    lengths = tuple(cell.seq_len for cell in CELLS)
    use(monkeypatch, refused=lengths)
    with bench_run.compile_first(CELLS, 2) as ahead:
        assert ahead.failed == {cell: f"not {cell.seq_len}" for cell in CELLS}


def test_what_was_compile_first_has_no_cold_time(monkeypatch):
    """One process, with the whole GPU, and its compile time is that from the cache."""
    children = use(monkeypatch)
    children.result = {"ms": 1.0, "compile_seconds": 0.5, "cache_hits": 1}
    ahead = bench_run.CompiledCells(cache="there", failed={})
    found = bench_run.run_cell(CELL, cached=True, compiled=ahead)
    assert found == {"ms": 1.0, "cached_compile_seconds": 0.5, "cached_cache_hits": 1}
    [(_, flags, variables)] = children.calls
    assert flags == () and variables["JAX_COMPILATION_CACHE_DIR"] == "there"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in variables


@pytest.mark.parametrize(
    ("failed", "why"),
    [({}, "the compiled step was not in the cache"), ({CELL: "killed"}, "killed")],
)
def test_a_step_missing_in_the_cache_is_reported(monkeypatch, failed, why):
    """It was compiled while measured, with what others left: neither cold nor from the cache."""
    children = use(monkeypatch)
    children.result = {"ms": 1.0, "compile_seconds": 40.0, "cache_hits": 0}
    ahead = bench_run.CompiledCells(cache="there", failed=failed)
    found = bench_run.run_cell(CELL, cached=True, compiled=ahead)
    assert found == {"ms": 1.0, "cached_why": why}


def test_one_job_compiles_cold_and_again(monkeypatch):
    """Each cell has its own cache, and a second process compiles from it."""
    children = use(monkeypatch)
    children.result = {"ms": 1.0, "remat": "dots", "compile_seconds": 40.0, "cache_hits": 0}
    found = bench_run.run_cell(CELL, cached=True)
    assert found["compile_seconds"] == 40.0 and found["cached_compile_seconds"] == 9.0
    assert [flags for _, flags, _ in children.calls] == [(), ("--compile_only",)]
    caches = {variables["JAX_COMPILATION_CACHE_DIR"] for _, _, variables in children.calls}
    assert len(caches) == 1
    bench_run.run_cell(CELL, cached=False)
    assert len(children.calls) == 3
    assert children.calls[2][2]["JAX_COMPILATION_CACHE_DIR"] not in caches
