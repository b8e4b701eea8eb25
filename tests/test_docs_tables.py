"""The tables of the documentation are those of the result files, before and after a new run."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "results"

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the documentation is not installed")
MACHINE = {"device": "1 x Abacus", "versions": "beads 9", "date": "2030-01-02", "commit": "abc"}


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(page: str, header: str) -> list[list[str]]:
    """Return the cells of the rows of the table that has this header."""
    _, _, rest = (DOCS / page).read_text().partition(f"{header}\n")
    assert rest, header
    lines = rest.splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:end]]


def test_every_page_has_the_tables_of_the_files(tables):
    """If this fails: make figures."""
    pages = tables.pages()
    assert {page.name for page in pages} == {
        *("README.md", "memory_and_speed.md", "models.md", "distributed.md")
    }
    for page in pages:
        assert tables.with_tables(page.read_text()) == page.read_text(), page
    text = "".join(page.read_text() for page in pages)
    assert {*tables.TABLES} == {name for _, name, _ in tables.REGION.findall(text)}


def test_tables_of_new_files(tables, tmp_path, monkeypatch):
    """Each table has the commit of the new files, and what could not run with its reason."""
    monkeypatch.setattr(tables, "EVIDENCE", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path.parent)
    kernel = {"forward_ms": 1.0, "both_ms": 3.0, "forward_tflops": 5.0, "both_tflops": 7.0}
    step = {"batch_size": 8, "ms": 500.0, "tokens_per_second": 65536.0, "mfu": 0.5}
    step |= {"peak_memory_bytes": 2**30, "remat": "dots", "seq_len": 4096}
    step |= {"param_dtype": "fp32", "state": "int8"}
    failed = {"seq_len": 4096, "why": "out of memory with remat full; the plan is 200.0 GiB"}
    files = {
        "kernels.json": [
            {"shape": "7b_4k_causal", "impl": "pallas"} | kernel,
            {"shape": "7b_4k_causal", "impl": "fa3", "why": "fa3 is not installed (pip ...)"},
        ],
        "seed/bench.json": [
            {"attn": "pallas", "rows": "dense"} | step,
            {"attn": "eager", "rows": "dense"} | failed,
        ],
        "steps/bench.json": [
            {"attn": "pallas", "rows": "packed"} | step,
            {"attn": "torch_sdpa", "rows": "packed"} | step | {"tokens_per_second": 1234.0},
            {"attn": "torch_sdpa", "rows": "dense"} | failed,
        ],
        "mesh/bench.json": [
            {"attn": "pallas", "rows": "packed", "mesh": "fsdp=1"} | step,
            {"attn": "pallas", "rows": "packed", "mesh": "seq=2"}
            | step
            | {"tokens_per_second": 98304.0},
        ],
    }
    for name, cells in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cells = [cell | MACHINE for cell in cells]
        (tmp_path / name).write_text(json.dumps({"cells": cells}))
    generate = [
        {
            "batch": 1,
            "prompt": 512,
            "first": 0.5,
            "tokens_per_second": 9.0,
            "bound_tokens_per_second": 10.0,
        }
    ]
    (tmp_path / "generate.json").write_text(json.dumps({"generate": generate} | MACHINE))
    made = {name: make() for name, make in tables.TABLES.items()}
    assert all("commit abc" in text and "older code" not in text for text in made.values())
    assert "| 7b_4k_causal | **1.00** / **3.00** (5 / 7) | - |" in made["kernels"]
    assert "- fa3: fa3 is not installed (pip ...) (7b_4k_causal)" in made["kernels"]
    assert "| pallas | **500** (65,536) |" in made["seed"]
    assert "- eager: out of memory with remat full" in made["seed"]
    assert "| cudnn | not measured |" in made["seed"]
    assert "| 1 | 512 | 0.500 s (1,024 tokens/s) | 9 | 10 |" in made["generation"]
    assert "| `seq=2` | 98,304 | 75.0% |" in made["meshes"]
    assert "packed documents | 1,234 (50.0%) | 65,536 (50.0%) |" in made["readme"]
    assert "| torch_sdpa | fp32, int8 | `dots` | 500 | 1,234 | 50.0% | 1.0 |" in made["steps"]


def test_lora_and_fp8_have_the_numbers_of_their_file():
    """The plan is that of the present code, and not in the file."""
    cells = json.loads((RESULTS / "train" / "h200" / "bench_fp8_lora.json").read_text())["cells"]
    of_file = {
        (
            f"{cell['model'].removeprefix('internlm2-').upper()}, "
            f"{cell['seq_len']:,} x {cell['batch_size']}",
            f"`{cell['remat']}`",
            f"{cell['tokens_per_second']:,.0f}",
            f"{cell['peak_memory_bytes'] / 2**30:.1f}",
        )
        for cell in cells
    }
    rows = rows_of("lora.md", "| model, rows | weights | remat | tokens/s | peak | plan |")
    assert len(rows) == 9
    for model, _, remat, rate, peak, _ in rows:
        assert (model, remat, rate, peak) in of_file
    cases = json.loads((RESULTS / "train" / "h200" / "fp8.json").read_text())["cases"]
    rates = {(c["matmul"], f"{round(c['tokens_per_second']):,}") for c in [*cells, *cases]}
    header = "| model, rows | weights, moments, remat | bf16, tokens/s | fp8, tokens/s | ratio |"
    for *_, bf16, fp8, ratio in rows_of("fp8.md", header):
        assert {("bf16", bf16), ("fp8", fp8)} <= rates
        numbers = (float(text.replace(",", "")) for text in (fp8, bf16))
        assert ratio == f"{next(numbers) / next(numbers):.2f}"


def test_losses_of_smaller_weights_are_those_of_their_files():
    header = "| weights, moments | mean loss of the last 50 steps | peak GiB | file |"
    rows = rows_of("memory_and_speed.md", header)
    assert len(rows) == 3
    for _, mean, peak, file in rows:
        lines = [json.loads(x) for x in (ROOT / file.strip("`")).read_text().splitlines()]
        losses = [line["loss"] for line in lines[-50:]]
        assert mean.split()[0] == f"{sum(losses) / len(losses):.3f}"
        assert float(peak) == pytest.approx(lines[-1]["peak_memory_bytes"] / 2**30, abs=0.06)


def test_long_rows_have_the_numbers_of_their_file():
    cases = json.loads((RESULTS / "train" / "h200" / "long_rows.json").read_text())["cases"]
    rate = {(c["case"], c["devices"]): c["tokens_per_second"] for c in cases}
    header = (
        "  | rows | one GPU, tokens/s | `--mesh.seq=2`, tokens/s | of twice one GPU | peak GiB, "
        "one / two (plan) |"
    )
    _, _, rest = (DOCS / "distributed.md").read_text().partition(f"{header}\n")
    found = re.findall(r"\| ([\w ]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+)% \|", rest)[:2]
    assert len(found) == 2
    for kind, one, two, share in found:
        case = f"1.8B, one row of 65,536 tokens, {kind}"
        assert (one, two) == (f"{rate[case, 1]:,.0f}", f"{rate[case, 2]:,.0f}")
        assert share == f"{rate[case, 2] / rate[case, 1] / 2:.1%}".rstrip("%")


def test_result_files_are_all_described():
    """results/README.md names each file with its command."""
    text = (RESULTS / "README.md").read_text()
    for file in RESULTS.rglob("*"):
        if file.is_file() and file.name != "README.md" and "evidence" not in file.parts:
            stem = file.stem.rpartition("_")[2]
            assert file.name in text or stem in text, file
