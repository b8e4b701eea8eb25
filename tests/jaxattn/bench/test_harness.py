"""Bench harness: child processes, results file, tables, and paths that are refused early."""

import io
import json
import sys

import jax
import pytest

from jaxattn import tune
from jaxattn.bench import __main__ as bench
from jaxattn.bench import harness
from jaxattn.bench.harness import (
    child_fields,
    machine,
    markdown_table,
    merge,
    output_file,
    picture_file,
    read_cells,
    report,
    run_child,
    text_table,
    write_cells,
)

CHILD = """
import json, os, sys
from jaxattn.bench.harness import child_fields
print("a library's greeting")
fields = child_fields()
if not fields:
    print("first\\nlast words", file=sys.stderr)
    sys.exit(3)
print(json.dumps(fields | ({"pid": os.getpid()} if sys.argv[1:] else {})))
"""


def test_a_child_returns_the_cell_that_it_prints_last(tmp_path, monkeypatch):
    """Or the last line of its errors; the process of the next cell starts before its turn."""
    (tmp_path / "child_of_bench.py").write_text(CHILD)
    environment = {"PYTHONPATH": f"{tmp_path}:."}
    assert run_child("child_of_bench", {"a": 1}, environment=environment) == {"a": 1}
    died = run_child("child_of_bench", {}, environment=environment)
    assert died == {"why": "process ended with 3: last words"}
    flag = ("child_of_bench", {"a": 1}, "--pid")
    first = run_child(*flag, another=True, environment=environment)
    [(_, started)] = [harness._next]
    second = run_child(*flag, environment=environment)
    assert second["pid"] == started.pid != first["pid"] and harness._next is None
    run_child(*flag, another=True, environment=environment)
    [(_, unused)] = [harness._next]
    run_child("child_of_bench", {"a": 1}, another=True, environment=environment)
    assert unused.returncode is not None  # it was of other flags
    harness._stop_next()
    assert harness._next is None
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert run_child("any", {"a": 1}) == {"a": 1, "why": "process ended with 1: no message"}


def test_report_prints_results_or_the_reason(capsys, monkeypatch):
    """Memory and refusals are reasons, another error of jax is raised."""

    def fails(error):
        def measure():
            raise error

        return measure

    jax_error = jax.errors.JaxRuntimeError
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": 1}\n'))
    fields = child_fields()
    report(lambda: {"ms": 2.0}, fields)
    report(fails(NotImplementedError("no GPU\nmore")), fields)
    report(fails(jax_error("RESOURCE_EXHAUSTED: 1 byte")), fields)
    report(fails(jax_error("RESOURCE_EXHAUSTED: 1 byte")), fields, out_of_memory=lambda: "planned")
    ran, refused, full, planned = map(json.loads, capsys.readouterr().out.splitlines())
    assert ran == {"a": 1, "ms": 2.0} and refused == {"a": 1, "why": "no GPU"}
    assert full["why"] == "out of device memory" and planned["why"] == "planned"
    with pytest.raises(jax_error, match="INTERNAL"):
        report(fails(jax_error("INTERNAL: a kernel failed")), fields)


def test_machine_is_asked_in_a_child():
    found = machine()
    assert found["device"] == "cpu" and found["versions"].startswith(f"jax {jax.__version__}, ")


def test_cells_are_kept_and_replaced(tmp_path):
    """A new cell takes the place of the old cells with one of its keys, at the end."""
    path = tmp_path / "bench.json"
    assert read_cells(path, "cpu") == []
    old = [{"name": name, "device": "cpu"} for name in "abc"]
    keys = lambda cell: [cell["name"], *cell.get("also", ())]  # noqa: E731
    new = {"name": "a", "device": "cpu", "also": ["c"]}
    write_cells(merge(old, new, keys), path)
    assert read_cells(path, "cpu") == [old[1], new]
    with pytest.raises(ValueError, match="is of cpu, not GPU: choose another --out"):
        read_cells(path, "GPU")
    path.write_text("[]")
    with pytest.raises(ValueError, match="is not of this bench: .*; choose another --out"):
        read_cells(path, "cpu")


def test_tables():
    rows = [["name", "ms"], ["long name", "1"]]
    assert text_table(rows) == "name       ms\nlong name  1"
    assert markdown_table(rows) == "| name | ms |\n| --- | --- |\n| long name | 1 |\n"


@pytest.mark.parametrize("flag", ["--out", "--plot"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("missing/x.png", "missing is no directory: make it first"), (".", "is a directory")],
)
def test_the_bench_refuses_what_it_cannot_write(flag, name, message, tmp_path, capsys):
    """Before a cell runs."""
    with pytest.raises(SystemExit):
        bench.main(["--shapes", "smoke", flag, str(tmp_path / name)])
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_the_tuner_refuses_it_too(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--out", str(tmp_path / "missing" / "tuned.json")])
    assert "missing is no directory" in capsys.readouterr().err


def test_a_plot_has_a_format_that_can_be_drawn(tmp_path, capsys):
    """The line names those that can."""
    with pytest.raises(SystemExit):
        bench.main(["--plot", str(tmp_path / "rates.txt")])
    assert "rates.txt must end in one of" in capsys.readouterr().err
    assert picture_file(str(tmp_path / "rates.svg")) == tmp_path / "rates.svg"


def test_what_can_be_written_passes(tmp_path):
    """A new file, and one that is there."""
    (tmp_path / "old.json").touch()
    for name in ("new.json", "old.json"):
        assert output_file(str(tmp_path / name)) == tmp_path / name
