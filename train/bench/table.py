"""Write the bench's results: console lines, Markdown tables, plots, and the checks of a file."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxattn.bench.harness import Cell, markdown_table, read_cells, write_cells
from jaxattn.device import GiB
from train.bench.shapes import TORCH, device_count, parse_mesh

RESULTS, TABLE = "bench.json", "table.md"
KEY = (
    *("model", "rows", "data", "seq_len", "tokens", "attn", "remat", "scan_layers"),
    *("dtype", "param_dtype", "optim", "state"),
)
LATER = {
    **{"grad_accum": 1, "z_loss": 0.0, "deterministic": False, "matmul": "bf16"},
    **{"lora_rank": None, "base_dtype": None, "mesh": None, "tile_size": None},
}
"""Fields that identify a cell, with the values of files without them. A new cell replaces an old
one with the same fields."""
ORIGIN = ("device", "versions", "date")
HEADER = (
    f"{'model':<14} {'rows':<6} {'seq_len':>7} {'x':>3} {'attention':<11} {'remat':<9} "
    f"{'ms/step':>9} {'tokens/s':>9} {'MFU':>6} {'peak GiB':>8} {'plan':>6} {'XLA':>6} "
    f"{'compile s':>9} {'cached':>6}"
)
ROWS = {"dense": "one document a row", "packed": "packed documents", "data": "packed files"}


def line(cell: Cell) -> str:
    """Return a cell as one line under `HEADER`."""
    where = f"{cell['model']:<14} {cell['rows']:<6} {cell['seq_len']:>7}"
    if "why" in cell:
        return f"{where} {'':>3} {cell['attn']:<11} cannot run: {cell['why']}"
    return (
        f"{where} {cell['batch_size']:>3} {cell['attn']:<11} {_remat(cell):<9} {cell['ms']:>9.1f} "
        f"{cell['tokens_per_second']:>9,.0f} {_mfu(cell):>6} {_gib(cell, 'peak_memory_bytes'):>8} "
        f"{_gib(cell, 'plan_bytes'):>6} {_gib(cell, 'xla_bytes'):>6} "
        f"{_seconds(cell, 'compile_seconds'):>9} {_seconds(cell, 'cached_compile_seconds'):>6}"
        + (f"  {cell['mesh']}" if cell.get("mesh") else "")
    )


def read(out: Path, device: str) -> list[Cell]:
    """Read the cells of earlier calls and check that new ones can be written.

    Args:
        out: directory of the results; created if it does not exist.
        device: device of the new cells.

    Raises:
        ValueError: the file has another content, or cells of another device; or `out` is a file.
        OSError: the directory cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file, must be a directory")
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, TABLE):
        if (out / name).is_dir():
            raise IsADirectoryError(f"--out={out}: {out / name} is a directory")
    probe = out / f".{RESULTS}.tmp"
    probe.touch()
    probe.unlink()
    cells = read_cells(out / RESULTS, device)
    for cell in cells:
        needed = (*KEY, *ORIGIN, *(() if "why" in cell else ("ms", "tokens_per_second")))
        missing = [name for name in needed if name not in cell]
        numbers = [cell.get(name, 0) for name in ("ms", "tokens_per_second", "seq_len", "tokens")]
        if missing or not all(isinstance(number, int | float) for number in numbers):
            what = f"a cell has no '{missing[0]}'" if missing else "a cell has text for a number"
            raise ValueError(f"{out / RESULTS} is not of this bench: {what}; choose another --out")
    return cells


def key(cell: Cell) -> Iterable[tuple]:
    """Yield the key of a cell, then those of its refusal before the open choices were made."""
    full = LATER | cell
    if cell["attn"] in TORCH:  # chosen by the memory, as its remat is
        full["grad_accum"] = 1
    open_choices = {"remat": None, "scan_layers": None, "tile_size": None}
    for same in (full, full | {"remat": None}, full | open_choices):
        yield tuple(json.dumps(same[name]) for name in (*KEY, *LATER))


def write(cells: list[Cell], out: Path) -> None:
    """Write bench.json, table.md, and a plot for each model and kind of rows."""
    write_cells(cells, out / RESULTS)
    (out / TABLE).write_text(markdown(cells))
    for (model, rows), group in _groups(cells, "model", "rows"):
        plot(group, out / f"{model}-{rows}.png")


def markdown(cells: list[Cell]) -> str:
    """Return the tables: implementations at their fastest, meshes, every cell; then the reasons."""
    parts = (_side_by_side(cells), _meshes(cells), _every(cells), _reasons(cells))
    return "\n".join([_origin(cells) + "\n", *filter(None, parts)])


def plot(cells: list[Cell], path: Path) -> None:
    """Plot step time against sequence length, one line for each implementation at its fastest."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ran = [cell for cell in cells if "ms" in cell]
    for (attn, stored), group in _groups(ran, "attn", _stored):
        fastest = {c["seq_len"]: c["ms"] for c in sorted(group, key=lambda c: -c["ms"])}
        label = attn if stored == "fp32" else f"{attn}, {stored}"
        axes.plot(*zip(*sorted(fastest.items()), strict=True), marker="o", label=label)
        axes.legend()
    lengths = sorted({cell["seq_len"] for cell in cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("{x:,.0f}")
    axes.set(xlabel="sequence length", ylabel="ms per training step")
    first = cells[0]
    axes.set_title(
        f"{first['model']}, {ROWS[first['rows']]}, {first['tokens']:,} tokens a step\n"
        f"{_origin(cells)}",
        fontsize=9,
    )
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def _side_by_side(cells: list[Cell]) -> str:
    attns = list(dict.fromkeys(cell["attn"] for cell in cells))
    lines = [["rows", *attns]]
    for (model, rows, stored, length), group in _groups(cells, "model", "rows", _stored, "seq_len"):
        ran = sorted((cell for cell in group if "ms" in cell), key=lambda cell: -cell["ms"])
        best = {cell["attn"]: cell for cell in ran}
        most = max((cell["tokens_per_second"] for cell in ran), default=None)
        size = f"{length:,}" + (f" x {ran[0]['batch_size']}" if ran else "")
        texts = [f"{model}, {rows}, {size}" + ("" if stored == "fp32" else f", {stored}")]
        for attn in attns:
            if attn in best:
                text = f"{best[attn]['ms']:,.0f} ({best[attn]['tokens_per_second']:,.0f})"
                texts.append(f"**{text}**" if best[attn]["tokens_per_second"] == most else text)
            else:
                tried = any(cell["attn"] == attn for cell in group)
                texts.append("cannot run" if tried else "")
        lines.append(texts)
    head = "ms a step (tokens/s), each implementation with its fastest remat.\n\n"
    return head + markdown_table(lines)


def _meshes(cells: list[Cell]) -> str:
    """Return the speed of each mesh, beside the first mesh of the same model and rows."""
    meshed = [cell for cell in cells if cell.get("mesh") and "ms" in cell]
    if not meshed:
        return ""
    lines = [
        ["rows", "mesh", "GPUs", "tokens/s", "of each GPU", "of the first mesh", "loss off by"]
    ]
    for _, group in _groups(meshed, "model", "rows", "attn", _stored_alike, "seq_len"):
        first = group[0]
        for cell in group:
            count = device_count(parse_mesh(cell["mesh"]))
            each = cell["tokens_per_second"] / count
            of_first = first["tokens_per_second"] / device_count(parse_mesh(first["mesh"]))
            off = "-"
            if cell["batch_size"] == first["batch_size"]:
                pairs = zip(cell["first_losses"], first["first_losses"], strict=False)
                off = f"{max(abs(a / b - 1) for a, b in pairs):.1e}"
            lines.append(
                [
                    f"{cell['model']}, {cell['rows']}, {cell['seq_len']:,} x {cell['batch_size']}",
                    cell["mesh"],
                    f"{count}",
                    f"{cell['tokens_per_second']:,.0f}",
                    f"{each:,.0f}",
                    f"{each / of_first:.1%}",
                    off,
                ]
            )
    return (
        "Meshes. The last columns compare with the first mesh of the same rows: tokens/s of each "
        "GPU, and the largest relative difference of the first losses where a step has the same "
        "rows.\n\n" + markdown_table(lines)
    )


def _every(cells: list[Cell]) -> str:
    names = ("model", "rows", "attention", "weights, moments", "remat", "ms", "tokens/s", "MFU")
    lines = [[*names, "peak GiB", "plan", "XLA", "compile s", "from cache"]]
    for cell in sorted(cells, key=lambda c: (c["model"], c["rows"], c["seq_len"], _stored(c))):
        if "why" in cell:
            continue
        lines.append(
            [
                cell["model"],
                f"{cell['rows']}, {cell['seq_len']:,} x {cell['batch_size']}",
                cell["attn"],
                _stored(cell),
                _remat(cell),
                f"{cell['ms']:,.1f}",
                f"{cell['tokens_per_second']:,.0f}",
                _mfu(cell),
                *(_gib(cell, name) for name in ("peak_memory_bytes", "plan_bytes", "xla_bytes")),
                *(_seconds(cell, f"{name}compile_seconds") for name in ("", "cached_")),
            ]
        )
    return (
        "Every cell that ran. PyTorch's remat is none or gradient checkpointing (full), with the "
        "number of microbatches; its peak is that of tensors.\n\n" + markdown_table(lines)
    )


def _reasons(cells: list[Cell]) -> str:
    """Return one line for each reason why cells cannot run."""
    where: dict[str, list[str]] = {}
    for cell in cells:
        if "why" in cell:
            name = f"{cell['attn']} ({cell['model']}, {cell['rows']}, {cell['seq_len']:,})"
            where.setdefault(cell["why"], []).append(name)
    return "".join(f"- {', '.join(names)} cannot run: {why}\n" for why, names in where.items())


def _origin(cells: list[Cell]) -> str:
    """Return device, versions and dates of the cells."""
    return "; ".join(dict.fromkeys(", ".join(cell[name] for name in ORIGIN) for cell in cells))


def _groups(cells: list[Cell], *by) -> Iterator[tuple[tuple, list[Cell]]]:
    """Yield (values, cells with them) by fields or functions, in order of appearance.

    The field seq_len, if it is the last, is in increasing order.
    """

    def values(cell: Cell) -> tuple:
        return tuple(key(cell) if callable(key) else cell[key] for key in by)

    keys = list(dict.fromkeys(map(values, cells)))
    if by[-1] == "seq_len":
        first = {key[:-1]: n for n, key in reversed([*enumerate(keys)])}
        keys.sort(key=lambda key: (first[key[:-1]], key[-1]))
    for found in keys:
        yield found, [cell for cell in cells if values(cell) == found]


def _stored_alike(cell: Cell) -> str:
    """Return `_stored` without the mesh."""
    return _stored({**cell, "mesh": None})


def _stored(cell: Cell) -> str:
    """Return the dtypes of weights and moments, and the options that are not the default."""
    name = "" if cell["optim"] == "adamw" else f", {cell['optim']}"
    name += "".join(f", {option}" for option in ("z_loss", "deterministic") if cell.get(option))
    name += ", fp8" if cell.get("matmul") == "fp8" else ""
    name += f", {cell['mesh']}" if cell.get("mesh") else ""
    name += f", tiles of {cell['tile_size']:,}" if cell.get("tile_size") else ""
    if cell.get("lora_rank"):
        base = cell["base_dtype"] or cell["dtype"]
        return f"LoRA {cell['lora_rank']} on {base}, {cell['state']}{name}"
    if cell["param_dtype"] == cell["state"]:
        return cell["state"] + name
    return f"{cell['param_dtype']}, {cell['state']}{name}"


def _remat(cell: Cell) -> str:
    microbatches = cell.get("grad_accum", 1)
    return f"{cell['remat']} x {microbatches}" if microbatches > 1 else cell["remat"]


def _mfu(cell: Cell) -> str:
    return f"{cell['mfu']:.1%}" if "mfu" in cell else "-"


def _gib(cell: Cell, name: str) -> str:
    return f"{cell[name] / GiB:.1f}" if name in cell else "-"


def _seconds(cell: Cell, name: str) -> str:
    return f"{cell[name]:.1f}" if name in cell else "-"
