"""The attention bench: a cell per implementation, what cannot run says why, results are kept."""

import json
import subprocess
import sys
from unittest import mock

import pytest

import jaxattn.bench
from jaxattn.bench import __main__ as bench
from jaxattn.bench import cell as bench_cell


def test_table_of_what_a_cpu_can_run(tmp_path, capsys):
    """A cell that runs has times, rates, memory and errors, one that cannot says why, in both."""
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--shapes", "smoke", "--impls", "xla", "eager", "pallas", "--check"]
    assert bench.main([*arguments, "--out", str(out), "--plot", str(picture)]) == 0
    written = json.loads(out.read_text())
    assert {"device", "jax", "date"} <= set(written)
    for impl in ("xla", "eager"):
        cell = written["cells"][f"smoke/{impl}"]
        assert min(cell["forward_ms"], cell["both_tflops"], cell["temp_bytes"]) > 0
        assert 0 < cell["errors"]["dq"]["mean"] < cell["errors"]["dq"]["max"] < 0.1
    assert "Hopper" in written["cells"]["smoke/pallas"]["why_not"]
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "not run: " in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_torch_a_cell_says_so(capsys, monkeypatch):
    """No PyTorch is a reason and not a traceback."""
    monkeypatch.delattr(jaxattn.bench, "torch_cell", raising=False)  # where it was imported before
    with mock.patch.dict(sys.modules, {"torch": None, "jaxattn.bench.torch_cell": None}):
        bench_cell.main(["torch-flex", "smoke", "7b_4k_causal"])
    machine, *cells = map(json.loads, capsys.readouterr().out.splitlines())
    assert machine == {} and len(cells) == 2
    assert "not installed" in cells[0]["why_not"]


def test_large_shapes_are_refused_on_a_cpu():
    """At once, before anything is allocated: the default run on a laptop ends with reasons."""
    for shape in bench.SHAPES.values():
        assert "smoke" in bench_cell.measure(shape, "xla", check=False)["why_not"]


def test_a_process_that_dies_costs_one_cell(monkeypatch, tmp_path):
    """The cells before it are kept, it says so itself, and those behind it are run."""
    script = (
        "import sys\n"
        "print('{}', flush=True)\n"
        "for name in sys.argv[4:]:\n"
        "    if name == 'b': sys.exit(3)\n"
        "    print('{\"ran\": 1}', flush=True)\n"
    )
    popen = subprocess.Popen

    def spawn(command, **options):
        return popen([sys.executable, "-c", script, *command[1:]], **options)

    monkeypatch.setattr(subprocess, "Popen", spawn)
    cells = {name: cell for name, _, cell in bench.run("xla", ["a", "b", "c"], check=False)}
    assert list(cells) == ["a", "b", "c"]
    assert cells["a"] == cells["c"] == {"ran": 1}
    assert "code 3" in cells["b"]["why_not"]


def test_results_are_written_after_every_cell(monkeypatch, tmp_path):
    """A run that is cut off keeps what it has."""
    out = tmp_path / "bench.json"

    def run(impl, names, *, check):
        yield names[0], {"device": "d"}, {"why_not": "first"}
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", run)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--impls", "xla", "--out", str(out)])
    assert json.loads(out.read_text())["cells"] == {"1.8b_32k_causal/xla": {"why_not": "first"}}


def test_a_cell_without_arguments_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        bench_cell.main([])
    assert "required: IMPLEMENTATION, SHAPE" in capsys.readouterr().err
