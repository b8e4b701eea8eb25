"""The bench's results for people and for the next call: lines, Markdown, plots, one JSON file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Found = dict[str, Any]
"""A cell's fields, and what was measured or why it cannot run; device, versions and date."""

GiB = 2**30

KEY = (
    *("model", "rows", "data", "seq_len", "tokens", "attn", "remat", "scan_layers"),
    *("dtype", "param_dtype", "optim", "state"),
)
"""What makes a cell a new one; any other with the same is replaced."""

HEADER = (
    f"{'model':<14} {'rows':<6} {'seq_len':>7} {'x':>3} {'attention':<11} {'remat':<9} "
    f"{'ms/step':>9} {'tokens/s':>9} {'MFU':>6} {'peak GiB':>8} {'plan':>6} {'XLA':>6} "
    f"{'compile s':>9} {'cached':>6}"
)


def line(cell: Found) -> str:
    """A cell as one line, printed when it is known."""
    where = f"{cell['model']:<14} {cell['rows']:<6} {cell['seq_len']:>7}"
    if "why" in cell:
        return f"{where} {'':>3} {cell['attn']:<11} cannot run: {cell['why']}"
    return (
        f"{where} {cell['batch_size']:>3} {cell['attn']:<11} {_remat(cell):<9} {cell['ms']:>9.1f} "
        f"{cell['tokens_per_second']:>9,.0f} {_mfu(cell):>6} {_gib(cell, 'peak_memory_bytes'):>8} "
        f"{_gib(cell, 'plan_bytes'):>6} {_gib(cell, 'xla_bytes'):>6} "
        f"{_seconds(cell, 'compile_seconds'):>9} {_seconds(cell, 'cached_compile_seconds'):>6}"
    )


def read(path: Path, device: str) -> list[Found]:
    """The cells that earlier calls have written.

    Args:
        path: of the JSON file; none has no cells.
        device: that new cells will be of.

    Raises:
        ValueError: it holds something else, or cells of another device.
    """
    if not path.exists():
        return []
    try:
        cells = json.loads(path.read_text())["cells"]
        others = {cell["device"] for cell in cells} - {device}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of this bench: {error!r}; choose another --out") from error
    if others:
        raise ValueError(f"{path} is of {', '.join(others)}, not {device}: choose another --out")
    return cells


def merged(cells: list[Found], new: Found) -> list[Found]:
    """The cells with a new one, in place of those that it replaces.

    One that ran also takes the place of the refusal of the same cell without a remat.
    """
    replaced = {_key(new), _key(new | {"remat": None})}
    return [cell for cell in cells if _key(cell) not in replaced] + [new]


def write(cells: list[Found], out: Path) -> None:
    """Writes bench.json, table.md, and a plot for each model and kind of rows."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps({"cells": cells}, indent=1) + "\n")
    (out / "table.md").write_text(markdown(cells))
    for (model, rows), group in _groups(cells, "model", "rows"):
        plot(group, out / f"{model}-{rows}.png")


def markdown(cells: list[Found]) -> str:
    """Implementations side by side, each at its fastest; every cell; why others cannot run."""
    parts = _side_by_side(cells), _every(cells), _refusals(cells)
    return "\n".join([_origin(cells) + "\n", *parts])


def plot(cells: list[Found], path: Path) -> None:
    """Draws step time against sequence length, a line per implementation, each at its fastest."""
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


ROWS = {"dense": "one document a row", "packed": "packed documents", "data": "packed files"}


def _side_by_side(cells: list[Found]) -> str:
    attns = list(dict.fromkeys(cell["attn"] for cell in cells))
    lines = _head("rows", *attns)
    for (model, rows, stored, length), group in _groups(cells, "model", "rows", _stored, "seq_len"):
        ran = [cell for cell in group if "ms" in cell]
        size = f"{length:,}" + (f" x {ran[0]['batch_size']}" if ran else "")
        best = {}
        for cell in sorted(ran, key=lambda cell: -cell["ms"]):
            best[cell["attn"]] = cell
        speeds = {attn: cell["tokens_per_second"] for attn, cell in best.items()}
        texts = []
        for attn in attns:
            if attn not in best:
                tried = any(cell["attn"] == attn for cell in group)
                texts.append("cannot run" if tried else "")
                continue
            text = f"{best[attn]['ms']:,.0f} ({speeds[attn]:,.0f})"
            texts.append(f"**{text}**" if speeds[attn] == max(speeds.values()) else text)
        where = f"{model}, {rows}, {size}" + ("" if stored == "fp32" else f", {stored}")
        lines.append(_row(where, *texts))
    return "ms a step (tokens/s), each implementation with its fastest remat.\n\n" + "".join(lines)


def _every(cells: list[Found]) -> str:
    names = ("model", "rows", "attention", "weights, moments", "remat", "ms", "tokens/s", "MFU")
    lines = _head(*names, "peak GiB", "plan", "XLA", "compile s", "from cache")
    ordered = sorted(cells, key=lambda c: (c["model"], c["rows"], c["seq_len"], _stored(c)))
    for cell in ordered:
        if "why" in cell:
            continue
        lines.append(
            _row(
                cell["model"],
                f"{cell['rows']}, {cell['seq_len']:,} x {cell['batch_size']}",
                cell["attn"],
                _stored(cell),
                _remat(cell),
                f"{cell['ms']:,.1f}",
                f"{cell['tokens_per_second']:,.0f}",
                _mfu(cell),
                _gib(cell, "peak_memory_bytes"),
                _gib(cell, "plan_bytes"),
                _gib(cell, "xla_bytes"),
                _seconds(cell, "compile_seconds"),
                _seconds(cell, "cached_compile_seconds"),
            )
        )
    return (
        "Every cell that ran; PyTorch's remat is none or gradient checkpointing (full), with the "
        "rows in as many parts as it says, its peak that of tensors.\n\n" + "".join(lines)
    )


def _refusals(cells: list[Found]) -> str:
    """What cannot run: a line for each reason."""
    where: dict[str, list[str]] = {}
    for cell in cells:
        if "why" in cell:
            name = f"{cell['attn']} ({cell['model']}, {cell['rows']}, {cell['seq_len']:,})"
            where.setdefault(cell["why"], []).append(name)
    return "".join(f"- {', '.join(names)} cannot run: {why}\n" for why, names in where.items())


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*texts: str) -> str:
    return f"| {' | '.join(texts)} |\n"


def _origin(cells: list[Found]) -> str:
    """Device, versions and dates of the cells."""
    return "; ".join(
        dict.fromkeys(f"{cell['device']}, {cell['versions']}, {cell['date']}" for cell in cells)
    )


def _groups(cells: list[Found], *by) -> Iterator[tuple[tuple, list[Found]]]:
    """(values, cells that have them), by fields or functions, in order of appearance.

    Lengths are in their own order.
    """

    def values(cell: Found) -> tuple:
        return tuple(key(cell) if callable(key) else cell[key] for key in by)

    keys = list(dict.fromkeys(map(values, cells)))
    if by[-1] == "seq_len":
        first = {key[:-1]: n for n, key in reversed([*enumerate(keys)])}
        keys.sort(key=lambda key: (first[key[:-1]], key[-1]))
    for key in keys:
        yield key, [cell for cell in cells if values(cell) == key]


def _key(cell: Found) -> tuple:
    return tuple(json.dumps(cell[name]) for name in KEY)


def _stored(cell: Found) -> str:
    """What weights and moments are stored in, and the optimizer if it is no AdamW."""
    name = "" if cell["optim"] == "adamw" else f", {cell['optim']}"
    if cell["param_dtype"] == cell["state"]:
        return cell["state"] + name
    return f"{cell['param_dtype']}, {cell['state']}{name}"


def _remat(cell: Found) -> str:
    return (
        f"{cell['remat']} x {cell['grad_accum']}"
        if cell.get("grad_accum", 1) > 1
        else cell["remat"]
    )


def _mfu(cell: Found) -> str:
    return f"{cell['mfu']:.1%}" if "mfu" in cell else "-"


def _gib(cell: Found, name: str) -> str:
    return f"{cell[name] / GiB:.1f}" if name in cell else "-"


def _seconds(cell: Found, name: str) -> str:
    return f"{cell[name]:.1f}" if name in cell else "-"
