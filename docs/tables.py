"""Write the tables of measurements into the documentation (`make figures`).

A page has a table between the lines `<!-- table NAME -->` and `<!-- end of table -->`. Each table
is made of the files of `make evidence`, and begins with the file, its date, device, versions and
commit.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
EVIDENCE = RESULTS / "evidence"
REGION = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Cell = dict[str, Any]


def main() -> None:
    """Write all tables into their pages."""
    for page in pages():
        text = page.read_text()
        if (new := with_tables(text)) != text:
            page.write_text(new)
            print(f"wrote the tables of {page.relative_to(ROOT)}")


def pages() -> list[Path]:
    """Return the pages that have tables."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in found if REGION.search(page.read_text())]


def with_tables(text: str) -> str:
    """Return a page with the present content of its tables.

    Raises:
        KeyError: a table has an unknown name.
    """

    def content(found: re.Match[str]) -> str:
        return f"{found[1]}{TABLES[found[2]]()}{found[3]}"

    return REGION.sub(content, text)


def kernels() -> str:
    """Return the table of attention alone: ms forward / forward and backward (TFLOP/s)."""
    file = EVIDENCE / "kernels.json"
    cells = {(cell["shape"], cell["impl"]): cell for cell in cells_of(file)}
    shapes = dict.fromkeys(shape for shape, _ in cells)
    impls = dict.fromkeys(impl for _, impl in cells)
    rows = [["shape", *impls]]
    for shape in shapes:
        ran = [c for i in impls if "both_ms" in (c := cells.get((shape, i), {}))]
        best = {n: min((c[n] for c in ran), default=None) for n in ("forward_ms", "both_ms")}
        rows.append([shape, *(_kernel(cells.get((shape, impl)), best) for impl in impls)])
    return f"{sources([file])}\n\n{markdown(rows)}{reasons(cells.values(), 'impl')}"


def _kernel(cell: Cell | None, best: dict[str, float | None]) -> str:
    if cell is None:
        return "not measured"
    if "both_ms" not in cell:
        return "-"
    pairs = [("forward_ms", "forward_tflops"), ("both_ms", "both_tflops")]
    times = (
        f"**{digits(cell[ms])}**" if cell[ms] == best[ms] else digits(cell[ms]) for ms, _ in pairs
    )
    return f"{' / '.join(times)} ({' / '.join(f'{cell[rate]:.0f}' for _, rate in pairs)})"


def seed() -> str:
    """Return the table of time per step against row length: ms (tokens/s)."""
    file = EVIDENCE / "seed" / "bench.json"
    cells = cells_of(file)
    lengths = sorted({cell["seq_len"] for cell in cells})
    rows = [["attention", *(f"{n:,} x {32_768 // n}" for n in lengths)]]
    found = {(cell["attn"], cell["seq_len"]): cell for cell in cells}
    times = {n: [c["ms"] for c in cells if c["seq_len"] == n and "ms" in c] for n in lengths}
    fastest = {n: min(ms, default=None) for n, ms in times.items()}
    for attn in ("pallas", "cudnn", "xla", "eager"):
        row = [attn]
        for n in lengths:
            cell = found.get((attn, n), {})
            if "ms" not in cell:
                row.append("-" if cell else "not measured")
                continue
            ms = f"{cell['ms']:,.0f}"
            ms = f"**{ms}**" if cell["ms"] == fastest[n] else ms
            row.append(f"{ms} ({cell['tokens_per_second']:,.0f})")
        rows.append(row)
    return f"{sources([file])}\n\n{markdown(rows)}{reasons(cells, 'attn')}"


def steps() -> str:
    """Return the table of whole steps: time, tokens/s, MFU and memory by implementation."""
    file = EVIDENCE / "steps" / "bench.json"
    cells = cells_of(file)
    settings = ("rows", "implementation", "weights, moments", "remat")
    rows = [[*settings, "ms", "tokens/s", "MFU", "peak GiB"]]
    kinds = {"dense": "one document each", "packed": "packed documents (median 1,500)"}
    for c in sorted(cells, key=lambda c: ([*kinds].index(c["rows"]), c["seq_len"])):
        if "ms" in c:
            of = f"{c['seq_len']:,} x {c['batch_size']}, {kinds[c['rows']]}"
            numbers = (f"{c['ms']:,.0f}", f"{c['tokens_per_second']:,.0f}", f"{c['mfu']:.1%}")
            stored = f"{c['param_dtype']}, {c['state']}"
            how = (of, c["attn"], stored, f"`{c['remat']}`")
            rows.append([*how, *numbers, gib(c["peak_memory_bytes"])])
    return f"{sources([file])}\n\n{markdown(rows)}{reasons(cells, 'attn')}"


def generation() -> str:
    """Return the table of generation."""
    file = EVIDENCE / "generate.json"
    found = json.loads(file.read_text())
    rows = [["batch", "prompt", "time to the first token", "tokens/s", "limit by memory bandwidth"]]
    for row in found["generate"]:
        limit = row["bound_tokens_per_second"]
        first = (
            f"{row['first']:.3f} s ({row['batch'] * row['prompt'] / row['first']:,.0f} tokens/s)"
        )
        rate = f"{row['tokens_per_second']:,.0f}"
        rows.append([f"{row['batch']}", f"{row['prompt']:,}", first, rate, f"{limit:,.0f}"])
    return f"{sources([file])}\n\n{markdown(rows)}"


def readme() -> str:
    """Return the README's table of whole steps."""
    cells = cells_of(EVIDENCE / "steps" / "bench.json")
    ran = [cell for cell in cells if "ms" in cell]
    tried = {(c["attn"], c["rows"], c["seq_len"]) for c in cells}
    heads = {"torch_sdpa": "PyTorch SDPA", "torch_liger": "PyTorch + Liger + FA4", "pallas": "here"}
    names = [name for name in heads if any(c["attn"] == name for c in ran)]
    rows = [["rows", *(f"{heads[name]}, tokens/s (MFU)" for name in names)]]
    longest = max(c["seq_len"] for c in ran)  # the only packed rows of the short table
    shown = (c for c in ran if c["rows"] == "dense" or c["seq_len"] == longest)
    for kind, length in sorted({(c["rows"], c["seq_len"]) for c in shown}):
        row = {c["attn"]: c for c in ran if (c["rows"], c["seq_len"]) == (kind, length)}
        count = next(iter(row.values()))["batch_size"]
        what = "one document each" if kind == "dense" else "packed documents"
        texts = (
            f"{c['tokens_per_second']:,.0f} ({c['mfu']:.1%})"
            if (c := row.get(n))
            else ("cannot run" if (n, kind, length) in tried else "not measured")
            for n in names
        )
        rows.append([f"{length:,} x {count}, {what}", *texts])
    origin = dict.fromkeys(f"{c['device']}, {c['date']}, commit {c['commit']}" for c in ran)
    return (
        "InternLM2-1.8B, 32,768 tokens a step, fp32 weights and Adam moments "
        "(PyTorch with Liger and\nFlashAttention-4: bf16 both), "
        f"{' / '.join(origin)}.\n"
        "PyTorch is transformers' Llama; its SDPA takes documents as a dense mask. "
        "[All figures](docs/memory_and_speed.md), and\n"
        "[what XTuner, torchtitan and others publish](docs/long_rows.md#measured); "
        "they were not run.\n\n" + markdown(rows).rstrip("\n") + "\n"
    )


def meshes() -> str:
    """Return the table of two GPUs beside one."""
    files = [EVIDENCE / name / "bench.json" for name in ("mesh", "mesh_long")]
    if files := [file for file in files if file.exists()]:
        rows = [["tokens a row", "mesh", "tokens/s", "of each GPU, beside one GPU"]]
        for file in files:
            ran = [cell for cell in cells_of(file) if "ms" in cell]
            one = next((c["tokens_per_second"] for c in ran if c["mesh"] == "fsdp=1"), None)
            for c in ran:
                of_one = c["tokens_per_second"] / (1 if c["mesh"] == "fsdp=1" else 2)
                rows.append(
                    [
                        *(f"{c['seq_len']:,}", f"`{c['mesh']}`", f"{c['tokens_per_second']:,.0f}"),
                        f"{of_one / one:.1%}" if one else "not measured",
                    ]
                )
        return f"{sources(files)}\n\n{markdown(rows)}"
    folder, rows = RESULTS / "train" / "h200", [["", "tokens/s"]]
    for name, label in {
        "one": "one GPU, `--grad_accum=2`",
        "fsdp2": "two GPUs, `--mesh.fsdp=2`",
        "tensor2": "two GPUs, `--mesh.tensor=2 --mesh.fsdp=1`",
    }.items():
        text = (folder / f"1.8b_32k_{name}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        rate = statistics.median(line["all_tokens_per_second"] for line in lines[1:])
        rows.append([label, f"{rate:,.0f}"])
    origin = "`results/train/h200/1.8b_32k_*.jsonl`: 2026-11-22 and 23, NVIDIA H200, jax 0.11.2;"
    return f"{origin}\nolder code, whose commit was not recorded.\n\n{markdown(rows)}"


def sources(files: Sequence[Path]) -> str:
    """Return a line with files, date, device, versions and commit of their cells."""
    origins = []
    for file in files:
        found = json.loads(file.read_text())
        for c in found.get("cells", [found]):
            origins.append(f"{c['date']}, {c['device']}, {c['versions']};\ncommit {c['commit']}")
    names = ", ".join(f"`{file.relative_to(ROOT)}`" for file in files)
    return f"{names}: {' / '.join(dict.fromkeys(origins))}."


def cells_of(file: Path) -> list[Cell]:
    """Return the cells of a bench."""
    return json.loads(file.read_text())["cells"]


def reasons(cells: Any, name: str) -> str:
    """Return a list of the reasons why cells could not run, numbers and lengths left out."""
    why: dict[str, list[str]] = {}
    for cell in cells:
        if "why" in cell:
            text = re.sub(r"^attention '\w+' cannot run: ", "", cell["why"])
            text = re.sub(r"; use (impl|--attn)=.*", "", text)
            where = cell.get("shape") or f"{cell['seq_len']:,} tokens"
            why.setdefault(f"{cell[name]}: {text}", []).append(where)
    return "".join(f"- {text} ({', '.join(of)})\n" for text, of in why.items())


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first row is the header."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def digits(ms: float) -> str:
    """Return milliseconds with three digits."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def gib(count: int) -> str:
    """Return bytes as GiB."""
    return f"{count / 2**30:.1f}"


TABLES: dict[str, Callable[[], str]] = {
    "kernels": kernels,
    "seed": seed,
    "steps": steps,
    "generation": generation,
    "meshes": meshes,
    "readme": readme,
}

if __name__ == "__main__":
    sys.exit(main())
