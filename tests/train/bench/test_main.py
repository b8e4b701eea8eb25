"""The bench measures the cells that can run, and records them with the reasons of the others."""

import contextlib
import io
import json
import os
import sys
import tempfile

import jax
import numpy as np
import pytest

from train.bench import __main__ as bench
from train.bench import cell as bench_cell
from train.bench import run as bench_run
from train.bench.table import line


@pytest.fixture(scope="module")
def this_machine() -> dict[str, str]:
    """Ask a child process for the device, once for all calls of the bench."""
    return bench.harness.machine()


@pytest.fixture
def children(monkeypatch, this_machine):
    """Give the child processes one device, and compile them quickly."""
    monkeypatch.setattr(bench.harness, "machine", lambda: this_machine)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.fixture
def in_process(monkeypatch, this_machine):
    """Measure the cells in this process, on its 8 devices: a child would import jax first."""

    def run_child(module, fields, *flags, **_):
        assert module == bench_cell.__name__
        monkeypatch.setattr(sys, "argv", [module, *flags])
        monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(fields)))
        with contextlib.redirect_stdout(io.StringIO()) as output:
            bench_cell.main()
        return json.loads(output.getvalue().splitlines()[-1])

    monkeypatch.setattr(bench.harness, "machine", lambda: this_machine)
    monkeypatch.setattr(bench.harness, "run_child", run_child)


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setattr(bench, "why_not_installed", lambda _: "PyTorch is not installed")
    monkeypatch.setattr(bench_run, "why_not_installed", lambda _: "PyTorch is not installed")


def test_two_calls_make_one_table(tmp_path, capsys, children, without_torch):
    """Real processes: cells that run on a CPU, compile again from the cache, and that cannot."""
    flags = ["--seq_lens", "32", "--tokens", "64", "--repeats", "1", f"--out={tmp_path}"]
    assert bench.main([*flags, "--attn", "xla", "pallas", "--rows", "dense"]) == 0
    output = capsys.readouterr().out
    assert "dense       32   2 xla         dots" in output
    assert "cannot run: attention 'pallas' cannot run: its kernels are for Ampere" in output

    text = tmp_path / "some.jsonl"
    text.write_text("".join(json.dumps({"text": "abc" * n}) + "\n" for n in range(1, 11)))
    again = ["--attn", "xla", "torch_sdpa", "--rows", "data", "--data", str(text), "--remat=full"]
    compact = [
        "--optim.moment_dtype=int8",
        "--param_dtype=bf16",
        "--no_cached",
        "--scan_layers=True",
    ]
    compact += ["--grad_accum=2", "--z_loss=0.01", "--deterministic"]
    assert bench.main([*flags, *again, *compact]) == 0
    cells = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert [(c["attn"], c["rows"]) for c in cells] == [
        ("xla", "dense"),
        ("pallas", "dense"),
        ("xla", "data"),
        ("torch_sdpa", "data"),
    ]
    dense, pallas, data, torch = cells
    assert dense["device"] == "cpu" and "jax" in dense["versions"] and dense["date"]
    assert dense["tokens_per_second"] == pytest.approx(64 / dense["ms"] * 1e3)
    assert dense["compile_seconds"] > 0 and dense["first_step_seconds"] > 0
    assert dense["cached_compile_seconds"] > 0 and dense["cached_cache_hits"] >= 1
    assert dense["xla_bytes"] > dense["filled"] == 1 and dense["plan_bytes"] > 0
    assert np.isfinite(dense["loss"]) and np.isfinite(data["loss"])
    assert data["remat"] == "full" and "cached_compile_seconds" not in data
    assert 0.5 < data["filled"] < 1  # padding is no work
    assert data["tokens_per_second"] == pytest.approx(64 * data["filled"] / data["ms"] * 1e3)
    assert data["plan_bytes"] < dense["plan_bytes"]
    assert "ms" not in pallas and "not installed" in torch["why"]
    for name in ("nano-dense.png", "nano-data.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (
        "| nano | data, 32 x 2 | xla | bf16, int8, z_loss, deterministic | full x 2 |"
        in (tmp_path / "table.md").read_text()
    )


def test_jobs_compile_first(tmp_path, capsys, children, without_torch):
    """Real processes: what is measured was found in the one cache, and is no cold compile time."""
    flags = "--jobs 2 --attn xla eager --rows dense --seq_lens 32 --tokens 64 --repeats 1".split()
    assert bench.main([*flags, f"--out={tmp_path}"]) == 0
    output = capsys.readouterr().out
    assert output.index("compiling the cells first, 2 at a time") < output.index("ms/step")
    cells = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert [cell["attn"] for cell in cells] == ["xla", "eager"]
    table = (tmp_path / "table.md").read_text()
    for cell in cells:
        assert cell["cached_cache_hits"] >= 1 and cell["cached_compile_seconds"] > 0
        assert not {"compile_seconds", "cache_hits", "cached_why"} & cell.keys()
        assert cell["xla_bytes"] > 0 and np.isfinite(cell["loss"])
        seconds = f"{cell['cached_compile_seconds']:.1f}"
        assert line(cell).split()[-2:] == ["-", seconds] and f"| - | {seconds} |" in table


def test_default_cells(without_torch):
    """Default table: every length, implementation and kind of rows, the remat chosen."""
    cells = list(bench.cells_of(bench.BenchConfig(), on_gpu=True))
    assert len(cells) == len(set(cells)) == 2 * 4 * 6
    assert {c.seq_len * c.batch_size for c in cells} == {32768}
    assert {(c.model, c.remat, c.dtype) for c in cells} == {("internlm2-1.8b", None, "bfloat16")}
    small = bench.cells_of(bench.BenchConfig(attn=("xla",), rows=("packed",)), on_gpu=False)
    assert [(c.model, c.seq_len, c.dtype) for c in small] == [
        ("nano", length, "float32") for length in (128, 256, 512)
    ]


def test_torch_joins_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(bench, "why_not_installed", {"torch_liger": "no liger"}.get)
    cells = bench.cells_of(bench.BenchConfig(), on_gpu=True)
    assert {c.attn for c in cells} == {*bench.OURS, "torch_sdpa", "torch_eager"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--model=huge"],
        ["--attn=fast"],
        ["--remat=some"],
        ["--repeats=0"],
        ["--jobs=0"],
        ["--grad_accum=0"],
        ["--repeat=3"],
        ["--rows=data"],
        ["--data=some.txt"],
    ],
    ids=" ".join,
)
def test_wrong_flags(flags, capsys):
    assert bench.main(flags) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_jobs_below_one_are_named(capsys):
    """Value, bound and what to do instead, on one line."""
    assert bench.main(["--jobs=-2"]) == 2
    output = capsys.readouterr().err
    assert output == "error: --jobs=-2 must be at least 1: 1 compiles no cell ahead\n"


@pytest.fixture
def no_cells(monkeypatch):
    """Fail if a cell is measured."""
    machine = {"device": "cpu", "versions": "jax 9", "date": "2030-01-02"}
    monkeypatch.setattr(bench.harness, "machine", lambda: machine)
    monkeypatch.setattr(bench, "run_cell", lambda *_, **__: pytest.fail("a cell was measured"))


def test_cells_of_another_device_are_kept_apart(tmp_path, capsys, no_cells):
    (tmp_path / "bench.json").write_text('{"cells": [{"device": "1 x Abacus"}]}')
    assert bench.main([f"--out={tmp_path}"]) == 2
    assert "is of 1 x Abacus, not" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench.json", "table.md", "."])
def test_an_out_that_cannot_be_written_is_refused_before_measuring(
    tmp_path, capsys, no_cells, name
):
    """The name of a result is a directory, or --out itself is a file."""
    out = tmp_path / "out"
    if name == ".":
        out.write_text("a file")
    else:
        (out / name).mkdir(parents=True)
    assert bench.main([f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out={out}") and error.count("\n") == 1


def test_an_out_without_permission_is_refused_before_measuring(capsys, no_cells):
    """The directory is read-only; root gives up its rights for the call."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        root = os.getuid() == 0
        if root:
            os.chown(name, 65534, 65534)
            os.setresuid(65534, 65534, 0)
        try:
            assert bench.main([f"--out={name}"]) == 2
        finally:
            if root:
                os.setresuid(0, 0, 0)
        error = capsys.readouterr().err
        assert "Permission denied" in error and name in error and error.count("\n") == 1


def test_meshes_on_simulated_devices(tmp_path, capsys, in_process, without_torch):
    """Each mesh takes the devices that it needs; the losses of equal rows are equal."""
    assert len(jax.devices()) == 8
    flags = ["--seq_lens", "32", "--tokens", "64", "--repeats", "1", f"--out={tmp_path}"]
    meshes = ["fsdp=1", "tensor=2", "fsdp=4,tensor=2", "fsdp=16"]
    flags += ["--attn", "xla", "--rows", "packed", "--no_cached", "--mesh", *meshes]
    assert bench.main(flags) == 0
    one, tensor, both, large = json.loads((tmp_path / "bench.json").read_text())["cells"]
    assert [cell["batch_size"] for cell in (one, tensor, both)] == [2, 2, 8]
    np.testing.assert_allclose(one["first_losses"], tensor["first_losses"], rtol=1e-5)
    assert large["why"] == "--mesh=fsdp=16 needs 16 devices, and there are 8"
    table = (tmp_path / "table.md").read_text()
    assert "| nano, packed, 32 x 2 | tensor=2 | 2 |" in table
    assert bench.main([*flags[:-4], "--mesh", "rows=2"]) == 2
    assert "--mesh=rows=2 must be AXIS=SIZE,..." in capsys.readouterr().err
