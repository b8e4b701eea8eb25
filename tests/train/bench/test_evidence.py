"""The evidence is measured in parts: finished ones are skipped, those left are named."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest

from jaxattn.bench import __main__ as attention_bench
from jaxattn.bench.shapes import FA3, SHAPES
from jaxattn.bench.shapes import TORCH as TORCH_KERNELS
from jaxattn.commit import VARIABLE, commit
from models.bench import BenchConfig as GenerateConfig
from models.cli import parse
from train.bench import __main__ as step_bench
from train.bench import evidence
from train.bench.cell import config_of
from train.bench.evidence import FILES, FLAGS, ON_TWO, PARTS, TINY, main
from train.bench.shapes import device_count, parse_mesh
from train.run.dry_run import device_spec
from train.run.resolve import resolve

MACHINE = {"device": "1 x Abacus", "versions": "beads 9", "date": "2030-01-02", "commit": "abc"}


@pytest.fixture(autouse=True)
def code(monkeypatch):
    """Name the commit, as for a copy of the code without a repository."""
    monkeypatch.setenv(VARIABLE, "abc")
    commit.cache_clear()
    yield
    commit.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Replace machine and child processes; return the list of the cells that were measured."""
    ran = []
    for module in (evidence.harness, attention_bench):
        monkeypatch.setattr(module, "machine", lambda: MACHINE)

    def attention(name, impl, *, check, another):
        ran.append((impl, name))
        cell = {"shape": name, "impl": impl}
        if impl == FA3:
            return cell | {"why": "fa3 is not installed (pip install dew-flash-attn-cu13)"}
        times = {"forward_ms": 1.0, "both_ms": 3.0, "forward_tflops": 1.0, "both_tflops": 1.0}
        return cell | (times if impl != "eager" else {"why": "out of device memory"})

    def step(cell, **_):
        ran.append((cell.attn, cell.seq_len))
        found = vars(cell) | {"data": [], "remat": "dots", "scan_layers": False}
        if cell.attn == "eager":
            return found | {"why": "out of memory with remat dots; the plan is 999.0 GiB"}
        return found | {"batch_size": cell.batch_size, "ms": 1.0, "tokens_per_second": 1.0}

    monkeypatch.setattr("train.bench.table.plot", lambda *_: None)  # takes a second for each cell
    monkeypatch.setattr(attention_bench, "run_cell", attention)
    monkeypatch.setattr(step_bench, "run_cell", step)
    monkeypatch.setattr(step_bench, "compile_first", lambda *_: contextlib.nullcontext())
    return ran


def test_cells_that_this_commit_has_measured_are_skipped(measured, tmp_path, monkeypatch, capsys):
    """Also those that cannot run; a missing package is tried again, another commit measures all."""
    flags = ["--parts", "kernels", "seed", f"--out={tmp_path}"]
    assert main(flags) == 0
    assert {impl for impl, _ in measured} >= {*attention_bench.IMPLEMENTATIONS, FA3, *TORCH_KERNELS}
    assert len(measured) == len(set(measured)) == 9 * len(attention_bench.IMPLEMENTATIONS) + 4 * 6
    cells = json.loads((tmp_path / FILES["kernels"]).read_text())["cells"]
    assert {(c["impl"], c["shape"]) for c in cells} == {c for c in measured if c[1] in SHAPES}
    assert all(MACHINE.items() <= cell.items() for cell in cells)
    measured.clear()
    assert main(flags) == 0
    assert {impl for impl, _ in measured} == {FA3}
    assert "evidence of commit abc: kernels done, seed done" in capsys.readouterr().out
    measured.clear()
    monkeypatch.setitem(MACHINE, "commit", "def")
    assert main(flags) == 0
    assert len(measured) == 9 * len(attention_bench.IMPLEMENTATIONS) + 4 * 6


def test_time_that_is_over_leaves_cells_for_the_next_call(measured, tmp_path, monkeypatch, capsys):
    """Each call begins at least one cell, and keeps what it has measured."""
    monkeypatch.setattr(step_bench.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    flags = ["--parts", "seed", "generate", "--minutes=4", f"--out={tmp_path}"]
    calls = 0
    while main(flags[:2] + flags[3:]) == 3:
        calls += 1
        assert calls < 30
    assert calls > 2 and len(measured) == len(set(measured)) == 24
    assert "cells are left: the same command with --resume goes on" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [FLAGS, TINY], ids=["full", "tiny"])
def test_flags_of_the_parts_are_those_of_the_benches(flags):
    """A mistake would show only on a GPU."""
    assert {*flags} == {*FILES} == {*PARTS}
    attention_bench._parse(flags["kernels"])
    parse(GenerateConfig, flags["generate"], "models.bench")
    for part in ("seed", "steps", *ON_TWO):
        config = parse(step_bench.BenchConfig, flags[part], "train.bench")
        assert list(step_bench.cells_of(config, on_gpu=flags is FLAGS))


def test_seed_has_all_implementations_and_lengths():
    config = parse(step_bench.BenchConfig, FLAGS["seed"], "train.bench")
    cells = [*step_bench.cells_of(config, on_gpu=True)]
    assert {c.attn for c in cells} == {"pallas", "cudnn", "xla", "eager"}
    assert {c.seq_len for c in cells} == {512, 2048, 4096, 8192, 16384, 32768}


def test_commands_for_four_and_eight_gpus_can_be_planned():
    """The commands of docs/distributed.md: every cell fits the H200s of its mesh."""
    page = (Path(__file__).parents[3] / "docs" / "distributed.md").read_text()
    text = page.replace("\\\n", " ")
    commands = re.findall(r"^python -m train.bench (.*)", text, re.M)
    assert len(commands) == 4
    planned = []
    for command in commands:
        config = parse(step_bench.BenchConfig, shlex.split(command), "train.bench")
        for cell in step_bench.cells_of(config, on_gpu=True):
            mesh = parse_mesh(cell.mesh)
            run = resolve(config_of(cell, mesh, device_count(mesh)), device_spec("h200"))
            planned.append((cell.model[-3:], cell.seq_len, cell.mesh, run.memory_advice))
    assert [plan[3] for plan in planned] == [None] * 13, planned


def test_wrong_machine_and_wrong_flags_are_one_line(measured, tmp_path, monkeypatch, capsys):
    assert main(["--parts=mesh", f"--out={tmp_path}"]) == 1
    assert "needs two GPUs" in capsys.readouterr().out
    assert main(["--parts=fast"]) == 2 and main(["--minutes=0"]) == 2
    monkeypatch.setattr(evidence, "commit", lambda: None)
    capsys.readouterr()
    assert main([]) == 2
    assert "give --commit=HASH" in capsys.readouterr().err
    assert not measured


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path, monkeypatch, capfd):
    """Real processes, with two fake devices; the second call finds everything done."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    flags = ["--tiny", "--parts", *PARTS, f"--out={tmp_path}"]
    for _ in range(2):
        assert main(flags) == 0
        assert ", ".join(f"{part} done" for part in PARTS) in capfd.readouterr().out
    for name in FILES.values():
        found = json.loads(Path(tmp_path, name).read_text())
        assert {cell["commit"] for cell in found.get("cells", [found])} == {"abc"}
