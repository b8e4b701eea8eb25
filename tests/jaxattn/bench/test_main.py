"""The attention bench: a cell per implementation, what cannot run says why, results are kept."""

import importlib.util
import json

import pytest

from jaxattn.bench import __main__ as bench
from jaxattn.bench import cell as bench_cell

ORIGIN = {"device": "cpu", "versions": "jax", "date": "today"}


def test_table_of_what_a_cpu_can_run(tmp_path, capsys, monkeypatch):
    """A cell that runs has times, rates, memory and errors, one that cannot says why, in both."""
    monkeypatch.setattr(bench, "machine", lambda: ORIGIN)
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--shapes", "smoke", "--impls", "xla", "eager", "pallas", "--check"]
    assert bench.main([*arguments, "--out", str(out), "--plot", str(picture)]) == 0
    cells = {cell["impl"]: cell for cell in json.loads(out.read_text())["cells"]}
    assert all({"device", "versions", "date"} <= set(cell) for cell in cells.values())
    for impl in ("xla", "eager"):
        cell = cells[impl]
        assert min(cell["forward_ms"], cell["both_tflops"], cell["temp_bytes"]) > 0
        assert 0 < cell["errors"]["dq"]["mean"] < cell["errors"]["dq"]["max"] < 0.1
    assert "Hopper" in cells["pallas"]["why"]
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "not run: " in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_torch_a_cell_has_the_reason(monkeypatch):
    """No PyTorch is a reason and not a traceback."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    cell = bench.run_cell("smoke", "torch-flex", check=False)
    assert cell["impl"] == "torch-flex" and "not installed" in cell["why"]


def test_large_shapes_are_refused_on_a_cpu():
    """At once, before anything is allocated: the default run on a laptop ends with reasons."""
    for shape in bench.SHAPES.values():
        assert "smoke" in bench_cell.measure(shape, "xla", check=False)["why"]


def test_a_process_that_dies_costs_one_cell(monkeypatch, tmp_path):
    """The cells before it are kept, it has a reason, the cells after it run."""

    def run_child(module, fields, **environment):
        if fields["shape"] == "7b_512_causal":
            return fields | {"why": "process ended with 3: no message"}
        return fields | {"forward_ms": 1.0, "both_ms": 2.0}

    monkeypatch.setattr(bench, "run_child", run_child)
    monkeypatch.setattr(bench, "machine", lambda: ORIGIN)
    out = tmp_path / "bench.json"
    shapes = ["7b_4k_causal", "7b_512_causal", "1.8b_32k_causal"]
    assert bench.main(["--impls", "xla", "--shapes", *shapes, "--out", str(out)]) == 0
    cells = {cell["shape"]: cell for cell in json.loads(out.read_text())["cells"]}
    assert list(cells) == shapes
    assert ["both_tflops" in cells[name] for name in shapes] == [True, False, True]
    assert "ended with 3" in cells["7b_512_causal"]["why"]


def test_results_are_written_after_every_cell(monkeypatch, tmp_path):
    """An interrupted run keeps its results."""
    out = tmp_path / "bench.json"

    def run_child(module, fields, **environment):
        if out.exists():
            raise KeyboardInterrupt
        return fields | {"why": "first"}

    monkeypatch.setattr(bench, "run_child", run_child)
    monkeypatch.setattr(bench, "machine", lambda: ORIGIN)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--impls", "xla", "--out", str(out)])
    [cell] = json.loads(out.read_text())["cells"]
    assert (cell["shape"], cell["impl"], cell["why"]) == ("1.8b_32k_causal", "xla", "first")


@pytest.mark.parametrize(("impl", "platforms"), [("torch-flex", "cpu"), ("pallas", None)])
def test_jax_leaves_the_gpu_to_torch(impl, platforms, monkeypatch):
    """Its memory, too: the child of a PyTorch cell sees no GPU for jax."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(bench, "run_child", lambda *_, another, environment=(): dict(environment))
    found = bench.run_cell("smoke", impl, check=False)
    assert found == ({} if platforms is None else {"JAX_PLATFORMS": platforms})


def test_results_of_another_device_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "machine", lambda: ORIGIN)
    out = tmp_path / "bench.json"
    out.write_text(json.dumps({"cells": [{"device": "1 x NVIDIA H200"}]}))
    assert bench.main(["--impls", "xla", "--out", str(out)]) == 2
    assert "is of 1 x NVIDIA H200, not cpu: choose another --out" in capsys.readouterr().err
