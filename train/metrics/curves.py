"""Plot the records of runs: one figure each for loss, speed, memory and so on, all runs in it."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display, no global state
from matplotlib.ticker import MaxNLocator

from train.metrics.run_records import RunRecords

FIGURES = (  # file name, key of the record, y axis, factor
    ("loss", "loss", "training loss", 1.0),
    ("lr", "lr", "learning rate", 1.0),
    ("grad_norm", "grad_norm", "gradient norm before clipping", 1.0),
    ("tokens", "tokens_per_second", "tokens/s without padding", 1.0),
    ("mfu", "mfu", "MFU (%), without masked pairs and recomputation", 100.0),
    ("time", "training_seconds", "seconds a step, without evaluation and checkpoints", 1.0),
    ("memory", "peak_memory_bytes", "peak memory (GiB)", 2.0**-30),
    ("skipped", "skipped", "skipped steps", 1.0),
)
STYLES = ("-", "--", ":", "-.")
"""Line styles of the files and validation sets of a run, in turn."""


def training_seconds(line: dict[str, Any]) -> float:
    """Return the seconds of a step without evaluation and checkpoints."""
    return line["seconds"] - line["evaluation_seconds"] - line["checkpoint_seconds"]


def figures(runs: Sequence[RunRecords]) -> Iterator[tuple[str, Figure]]:
    """Yield (name, figure) of everything that at least one run has. A run keeps its color."""
    steps = [
        [line | {"training_seconds": training_seconds(line)} for line in run.steps] for run in runs
    ]
    for name, key, label, factor in FIGURES:
        if any(key in line for lines in steps for line in lines):
            figure, axes = _figure(label)
            for number, (run, lines) in enumerate(zip(runs, steps, strict=True)):
                _plot(axes, lines, key, factor, label=run.name, color=f"C{number}")
            if name == "time":  # the first step includes start-up and may be much longer
                axes.set_yscale("log")
            axes.legend(fontsize=8)
            yield name, figure
    losses = [
        [
            {"step": line["step"], "set": name, **of}
            for line in run.steps
            for name, of in line.get("sources", {}).items()
        ]
        for run in runs
    ]
    if any(losses):
        yield "sources", _by_set(runs, losses, "training loss by file")
    if any(run.evals for run in runs):
        lines = [run.evals for run in runs]
        yield "validation", _by_set(runs, lines, "validation loss", marker="o")


def _by_set(
    runs: Sequence[RunRecords], losses: Sequence[list[dict[str, Any]]], title: str, **style
) -> Figure:
    """Return a figure with a curve for each "set" in the lines of each run."""
    figure, axes = _figure(title)
    for number, (run, of_run) in enumerate(zip(runs, losses, strict=True)):
        for nth, name in enumerate(dict.fromkeys(line["set"] for line in of_run)):
            lines = [line for line in of_run if line["set"] == name]
            style |= {"linestyle": STYLES[nth % len(STYLES)], "label": f"{run.name}: {name}"}
            _plot(axes, lines, "loss", 1.0, color=f"C{number}", **style)
    axes.legend(fontsize=8)
    return figure


def _plot(axes: Axes, lines: Sequence[dict[str, Any]], key: str, factor: float, **style) -> None:
    have = [line for line in lines if line.get(key) is not None]
    axes.plot([line["step"] for line in have], [line[key] * factor for line in have], **style)


def _figure(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    return figure, axes
