"""The bench's table: what is new replaces what is old, and the fastest is marked."""

import dataclasses
import json

import pytest

from tests.train.cells import CELL
from train.bench.table import markdown, merged, read, write

MACHINE = {"device": "1 x Abacus", "versions": "jax 9", "date": "2030-01-02"}


def found(ms=None, **fields):
    """A cell as it is written."""
    cell = dataclasses.asdict(CELL) | MACHINE | fields
    if ms is None:
        return cell | {"why": "too | large"}
    return cell | {"ms": ms, "tokens_per_second": 64e3 / ms, "batch_size": 2, "mfu": 0.5}


def test_new_cells_replace_old_ones():
    cells = merged([], found(4.0))
    cells = merged(cells, found(3.0, remat="dots"))
    cells = merged(cells, found(2.0))
    assert [cell["ms"] for cell in cells] == [3.0, 2.0]
    assert len(merged(cells, found(2.0, state="int8"))) == 3


def test_what_runs_replaces_its_refusal():
    """A refusal before the remat was chosen has none."""
    refused = merged([], found(remat=None))
    assert [cell["ms"] for cell in merged(refused, found(1.0))] == [1.0]


def test_written_and_read_again(tmp_path):
    cells = [found(4.0), found(attn="pallas")]
    write(cells, tmp_path / "new")
    names = {"bench.json", "table.md", "nano-dense.png"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    path = tmp_path / "new" / "bench.json"
    assert read(path, "1 x Abacus") == json.loads(json.dumps(cells))
    assert read(tmp_path / "none.json", "1 x Abacus") == []
    with pytest.raises(ValueError, match="is of 1 x Abacus, not cpu"):
        read(path, "cpu")
    path.write_text("[]")
    with pytest.raises(ValueError, match="not of this bench"):
        read(path, "cpu")


def test_the_fastest_of_each_is_compared():
    cells = [
        found(8.0, remat="full"),
        found(4.0, remat="dots"),
        found(5.0, attn="torch_sdpa", remat="full", grad_accum=4),
        found(attn="pallas", remat=None),
        found(2.0, seq_len=16),
        found(3.0, param_dtype="bf16", state="int8"),
    ]
    text = markdown(cells)
    assert "| rows | xla | torch_sdpa | pallas |" in text
    assert "| nano, dense, 32 x 2 | **4 (16,000)** | 5 (12,800) | cannot run |" in text
    assert text.index("| nano, dense, 16 x 2 |") < text.index("| nano, dense, 32 x 2 |")
    assert "| nano, dense, 32 x 2, bf16, int8 | **3 (21,333)** |  |  |" in text
    assert "| torch_sdpa | fp32 | full x 4 | 5.0 | 12,800 | 50.0% |" in text
    assert "- pallas (nano, dense, 32) cannot run: too | large" in text
    assert text.startswith("1 x Abacus, jax 9, 2030-01-02\n")
