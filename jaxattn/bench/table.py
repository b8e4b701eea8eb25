"""The bench's results for people: a line as each is known, the table of all, the plot."""

import pathlib

Cells = dict[str, dict[str, dict]]  # by shape, by implementation

HEADER = f"{'shape':20} {'impl':10} {'forward':>8} {'+backward':>9}     useful rate       memory"


def line(name: str, impl: str, cell: dict) -> str:
    """A cell as one line, printed when it is known."""
    if "why_not" in cell:
        return f"{name:20} {impl:10} not run: {cell['why_not']}"
    text = (
        f"{name:20} {impl:10} {cell['forward_ms']:8.3f} {cell['both_ms']:9.3f} ms  "
        f"{cell['forward_tflops']:5.0f} {cell['both_tflops']:5.0f} TFLOP/s"
    )
    if "temp_bytes" in cell:
        text += f"  {cell['temp_bytes'] / 2**20:6.0f} MiB"
    if "errors" in cell:
        text += "  max err " + " ".join(f"{n} {e['max']:.1e}" for n, e in cell["errors"].items())
    return text


def table(cells: Cells) -> str:
    """All shapes against all implementations: ms forward / forward and backward, and the ratios.

    The ratios are how many times the useful rate of cudnn pallas has, forward / both: a GPU that
    is held at its power cap slows both down, so they say more than the times.
    """
    impls = list(dict.fromkeys(impl for row in cells.values() for impl in row))
    heads = ["shape", *impls, "pallas/cudnn"]
    rows = [
        [name, *(_times(row.get(impl, {})) for impl in impls), _ratio(row)]
        for name, row in cells.items()
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    )
    return "\n".join(lines)


def plot(cells: Cells, head: dict[str, str], path: pathlib.Path) -> None:
    """Draws the useful rate, a bar for each implementation that ran, forward above both."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    impls = list(dict.fromkeys(impl for row in cells.values() for impl in row))
    ran = [impl for impl in impls if any("both_ms" in row.get(impl, {}) for row in cells.values())]
    figure = Figure(figsize=(3 + 1.2 * len(cells), 7), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    width = 0.8 / max(1, len(ran))
    for axes, what in zip(panels, ("forward", "both"), strict=True):
        for i, impl in enumerate(ran):
            bars = [
                (at + (i + 0.5) * width - 0.4, row[impl][f"{what}_tflops"])
                for at, row in enumerate(cells.values())
                if "both_ms" in row.get(impl, {})
            ]
            axes.bar(*zip(*bars, strict=True), width=width, label=impl)
        name = "forward" if what == "forward" else "forward + backward"
        axes.set(ylabel=f"{name}, useful TFLOP/s")
        axes.grid(alpha=0.3, axis="y")
    panels[1].set_xticks(range(len(cells)), list(cells), rotation=20, ha="right")
    if ran:
        panels[0].legend(ncols=len(ran), fontsize=8)
    panels[0].set_title(", ".join(f"{v}" for v in head.values()), fontsize=9)
    figure.savefig(path, dpi=150)


def _times(cell: dict) -> str:
    return f"{cell['forward_ms']:.2f} / {cell['both_ms']:.2f}" if "both_ms" in cell else "-"


def _ratio(row: dict[str, dict]) -> str:
    ours, theirs = row.get("pallas", {}), row.get("cudnn", {})
    if "both_ms" not in ours or "both_ms" not in theirs:
        return "-"
    ratios = (theirs[key] / ours[key] for key in ("forward_ms", "both_ms"))
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)
