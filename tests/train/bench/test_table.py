"""The bench's table: new cells replace old ones, and the fastest is marked."""

import dataclasses
import json

import pytest

from jaxattn.bench.harness import merge
from tests.train.cells import CELL
from train.bench.table import LATER, key, markdown, read, write

MACHINE = {"device": "1 x Abacus", "versions": "jax 9", "date": "2030-01-02"}


def found(ms=None, **fields):
    """Return a cell as it is written."""
    cell = dataclasses.asdict(CELL) | MACHINE | fields
    if ms is None:
        return cell | {"why": "too | large"}
    return cell | {"ms": ms, "tokens_per_second": 64e3 / ms, "batch_size": 2, "mfu": 0.5}


def test_new_cells_replace_old_ones():
    cells = merge([], found(4.0), key)
    cells = merge(cells, found(3.0, remat="dots"), key)
    cells = merge(cells, found(2.0), key)
    assert [cell["ms"] for cell in cells] == [3.0, 2.0]
    assert len(merge(cells, found(2.0, state="int8"), key)) == 3


def test_options_that_older_files_lack_have_their_default():
    """A cell without accumulation replaces one of an older file; one with it does not."""
    old = {k: v for k, v in found(4.0).items() if k not in LATER}
    assert [cell["ms"] for cell in merge([old], found(2.0), key)] == [2.0]
    assert len(merge([old], found(2.0, grad_accum=2), key)) == 2
    assert len(merge([old], found(2.0, z_loss=1e-4), key)) == 2
    torch = found(4.0, attn="torch_sdpa", grad_accum=4)  # PyTorch's cells choose by memory
    assert len(merge([torch], found(2.0, attn="torch_sdpa"), key)) == 1


def test_what_runs_replaces_its_refusal():
    """A refusal before the remat was chosen has none."""
    refused = merge([], found(remat=None), key)
    assert [cell["ms"] for cell in merge(refused, found(1.0), key)] == [1.0]


def test_written_and_read_again(tmp_path):
    cells = [found(4.0), found(attn="pallas")]
    out = tmp_path / "new"
    assert read(out, "1 x Abacus") == []
    write(cells, out)
    names = {"bench.json", "table.md", "nano-dense.png"}
    assert {path.name for path in out.iterdir()} == names
    assert read(out, "1 x Abacus") == json.loads(json.dumps(cells))
    with pytest.raises(ValueError, match="is of 1 x Abacus, not cpu"):
        read(out, "cpu")


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"cells": 3},
        {"cells": ["x"]},
        {"cells": [{"device": "1 x Abacus"}]},
        {"cells": [found(4.0) | {"ms": "4"}]},
        {"cells": [{k: v for k, v in found(4.0).items() if k != "tokens_per_second"}]},
    ],
    ids=["list", "number", "text", "no-fields", "text-for-number", "no-speed"],
)
def test_a_file_of_another_shape_is_one_line(tmp_path, content):
    (tmp_path / "bench.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not of this bench: .*; choose another --out") as error:
        read(tmp_path, "1 x Abacus")
    assert "\n" not in str(error.value)


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
