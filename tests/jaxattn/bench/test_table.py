"""Printed table and plot of the bench."""

import pathlib

from jaxattn.bench.harness import read_cells
from jaxattn.bench.table import plot, table

RESULTS = pathlib.Path(__file__).parents[3] / "results" / "evidence" / "kernels.json"


def test_ratio_to_cudnn_is_of_rates():
    """Twice as fast as cudnn forward, half as fast with backward; no ratio where one is missing."""
    cells = [
        {"shape": "dense", "impl": "pallas", "forward_ms": 1.0, "both_ms": 8.0},
        {"shape": "dense", "impl": "cudnn", "forward_ms": 2.0, "both_ms": 4.0},
        {"shape": "packed", "impl": "pallas", "forward_ms": 1.0, "both_ms": 8.0},
        {"shape": "packed", "impl": "cudnn", "why": "documents"},
    ]
    head, dense, packed = table(cells).splitlines()
    assert head.split() == ["shape", "pallas", "cudnn", "pallas/cudnn"]
    assert dense.endswith("2.00 / 0.50")
    assert packed.endswith("1.00 / 8.00  -            -")


def test_published_results_can_be_read_and_drawn(tmp_path):
    """The file of the documentation has the format of the harness."""
    cells = read_cells(RESULTS, "1 x NVIDIA H200")
    assert "1.8b_32k_causal" in table(cells)
    plot(cells, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
