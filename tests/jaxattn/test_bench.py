"""The attention bench: useful work counted right, one cell per implementation, JSON written."""

import json

import jax
import numpy as np
import pytest

from jaxattn import bench
from jaxattn.bench import Shape

SMALL = {
    "causal": Shape(batch=1, length=64, heads=2, kv_heads=1),
    "packed": Shape(batch=2, length=96, heads=2, kv_heads=2, documents=(20.0, 1.0), window=9),
}


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_pairs_are_the_visible_ones(shape):
    """What counts as useful is what the mask shows, no more."""
    visible = shape.mask().visible(shape.length, shape.length)
    assert shape.pairs() == int(np.broadcast_to(visible, (shape.batch, *visible.shape[1:])).sum())


def test_document_lengths_are_those_of_the_peers_table():
    """20 documents, longest 5,526: the shape that other implementations were measured on."""
    lengths = bench.document_lengths(32768, 1500.0, 1.0)
    assert (len(lengths), max(lengths), sum(lengths)) == (20, 5526, 32768)


def test_table(monkeypatch, tmp_path, capsys):
    """A cell that runs has times and errors, one that cannot says why, and both are in the file."""
    monkeypatch.setattr(bench, "SHAPES", SMALL)
    out = tmp_path / "bench.json"
    arguments = ["--shapes", "causal", "--impls", "xla", "pallas", "--check", "--out", str(out)]
    # bf16 through jax.nn needs jax's usual promotion rules.
    with jax.numpy_dtype_promotion("standard"):
        assert bench.main(arguments) == 0
    cells = json.loads(out.read_text())["cells"]
    assert cells["causal/xla"]["both_ms"] > 0
    assert 0 < cells["causal/xla"]["errors"]["dq"]["max"] < 0.1
    assert "Hopper" in cells["causal/pallas"]["why_not"]
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "cannot run" in printed
