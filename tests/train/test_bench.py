"""The bench measures what can run, says why the rest cannot, and writes both down."""

import json

import numpy as np
import pytest

from train import bench
from train.bench_cell import random_rows
from train.flops import causal_pairs


def test_table_json_and_plot(tmp_path, capsys, monkeypatch):
    """Real processes: one cell that runs on a CPU, and one that cannot."""
    monkeypatch.setenv("XLA_FLAGS", "")  # the children need no 8 devices
    flags = ["--attn", "xla", "pallas", "--seq_lens", "32", "--tokens", "32", "--repeats", "1"]
    assert bench.main([*flags, f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "32     1 xla" in said
    assert (
        "pallas     cannot run: attention 'pallas' cannot run: its kernels are for Hopper" in said
    )
    table = json.loads((tmp_path / "nano.json").read_text())
    assert table["platform"] == "cpu" and "jax" in table["versions"] and table["date"]
    xla, pallas = table["cells"]
    assert xla["ms"] > 0 and xla["compile_seconds"] > 0 and np.isfinite(xla["loss"])
    assert xla["tokens_per_second"] == pytest.approx(32 / xla["ms"] * 1e3)
    assert "ms" not in pallas and pallas["why"]
    assert (tmp_path / "nano.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_that_dies_is_a_line(monkeypatch):
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    cell = bench.Cell(
        model="nano",
        attn="xla",
        seq_len=8,
        tokens=8,
        packed=False,
        remat="full",
        scan_layers=True,
        dtype="float32",
        repeats=1,
    )
    assert "cannot run: process ended with 1: nothing" in bench.row(bench.run_cell(cell))


@pytest.mark.parametrize("flag", ["--model=huge", "--remat=some", "--repeats=0", "--repeat=3"])
def test_wrong_flags(flag, capsys):
    assert bench.main([flag]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_packed_rows_are_documents():
    rows = random_rows(2, 32768, 320, packed=True)
    lengths = np.bincount(rows.segment_ids[0])[1:]
    assert len(lengths) == 20 and lengths.sum() == 32768  # as jaxattn.bench's 7b_32k_packed
    assert lengths.max() == 5526 and lengths[:-1].min() >= 16
    starts = np.flatnonzero(rows.positions[0] == 0)
    assert len(starts) == len(lengths) and (rows.positions[0] < 16384).all()
    assert causal_pairs(rows.segment_ids) < 2 * 32768 * 32769 // 2 / 4


def test_dense_rows_are_one_document():
    rows = random_rows(3, 16, 320, packed=False)
    assert (rows.segment_ids == 1).all() and (rows.positions == np.arange(16)).all()
    np.testing.assert_array_equal(rows.targets[:, :-1], rows.tokens[:, 1:])
