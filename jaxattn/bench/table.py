"""Text and plot of the bench's results: a line per cell, the table of all cells, a bar chart."""

import pathlib

from jaxattn.bench.harness import Cell, text_table

HEADER = f"{'shape':20} {'impl':10} {'forward':>8} {'+backward':>9}     useful rate       memory"


def line(cell: Cell) -> str:
    """Format a cell as one line."""
    where = f"{cell['shape']:20} {cell['impl']:10}"
    if "why" in cell:
        return f"{where} not run: {cell['why']}"
    text = (
        f"{where} {cell['forward_ms']:8.3f} {cell['both_ms']:9.3f} ms  "
        f"{cell['forward_tflops']:5.0f} {cell['both_tflops']:5.0f} TFLOP/s"
    )
    if "temp_bytes" in cell:
        text += f"  {cell['temp_bytes'] / 2**20:6.0f} MiB"
    if "errors" in cell:
        text += "  max err " + " ".join(f"{n} {e['max']:.1e}" for n, e in cell["errors"].items())
    return text


def table(cells: list[Cell]) -> str:
    """Format all shapes against all implementations: ms forward / forward and backward.

    The last column is the useful rate of pallas over that of cudnn, forward / forward and backward.
    A GPU at its power cap slows both down, so the ratios are more reliable than the times.
    """
    rows, impls = _rows(cells)
    header = ["shape", *impls, "pallas/cudnn"]
    body = [
        [name, *(_times(row.get(impl, {})) for impl in impls), _ratio(row)]
        for name, row in rows.items()
    ]
    return text_table([header, *body])


def plot(cells: list[Cell], path: pathlib.Path) -> None:
    """Draw the useful rate as a bar for each implementation that ran, forward above both passes."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    rows, _ = _rows(cells)
    _, ran = _rows([cell for cell in cells if "both_ms" in cell])
    figure = Figure(figsize=(3 + 1.2 * len(rows), 7), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    width = 0.8 / max(1, len(ran))
    for axes, passes in zip(panels, ("forward", "both"), strict=True):
        for i, impl in enumerate(ran):
            bars = [
                (index + (i + 0.5) * width - 0.4, row[impl][f"{passes}_tflops"])
                for index, row in enumerate(rows.values())
                if "both_ms" in row.get(impl, {})
            ]
            axes.bar(*zip(*bars, strict=True), width=width, label=impl)
        name = "forward" if passes == "forward" else "forward + backward"
        axes.set(ylabel=f"{name}, useful TFLOP/s")
        axes.grid(alpha=0.3, axis="y")
    panels[1].set_xticks(range(len(rows)), list(rows), rotation=20, ha="right")
    if ran:
        panels[0].legend(ncols=len(ran), fontsize=8)
    origins = (f"{cell['device']}, {cell['versions']}, {cell['date']}" for cell in cells)
    panels[0].set_title("; ".join(dict.fromkeys(origins)), fontsize=9)
    figure.savefig(path, dpi=150)


def _rows(cells: list[Cell]) -> tuple[dict[str, dict[str, Cell]], list[str]]:
    """Group the cells by shape and implementation; return the groups and all implementations."""
    rows: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell["shape"], {})[cell["impl"]] = cell
    return rows, list(dict.fromkeys(cell["impl"] for cell in cells))


def _times(cell: Cell) -> str:
    return f"{cell['forward_ms']:.2f} / {cell['both_ms']:.2f}" if "both_ms" in cell else "-"


def _ratio(row: dict[str, Cell]) -> str:
    ours, theirs = row.get("pallas", {}), row.get("cudnn", {})
    if "both_ms" not in ours or "both_ms" not in theirs:
        return "-"
    ratios = (theirs[key] / ours[key] for key in ("forward_ms", "both_ms"))
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)
