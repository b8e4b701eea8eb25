"""The curves of a report: one figure each, all runs in it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display, no global state

PARTS = ("compute", "data", "evaluation", "checkpoint")
SPEEDS = {
    "all_tokens_per_second": ":",
    "tokens_per_second": "-",
    "loss_tokens_per_second": "--",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run has written."""

    name: str
    """Of its directory."""

    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl."""

    evals: list[dict[str, Any]]
    """Lines of eval.jsonl."""

    config: dict[str, Any]
    """config.json, or empty."""


def figures(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """Yields (file name, figure) of everything that any of the runs has."""
    for name, key, title, scale in (
        ("loss", "loss", "training loss", 1.0),
        ("lr", "lr", "learning rate", 1.0),
        ("grad_norm", "grad_norm", "gradient norm before clipping", 1.0),
        ("mfu", "mfu", "MFU (%): useful work only, no masked pairs, no recomputation", 100.0),
        ("memory", "peak_memory_bytes", "peak memory (GiB)", 2.0**-30),
        ("skipped", "skipped", "skipped steps", 1.0),
    ):
        if any(key in line for run in runs for line in run.steps):
            figure, axes = _figure(title)
            for run in runs:
                _line(axes, run.steps, key, scale=scale, label=run.name)
            yield name, _done(figure, axes)
    if any(run.evals for run in runs):
        yield "validation", _validation(runs)
    yield "tokens", _speeds(runs)
    yield "time", _times(runs)


def _validation(runs: Sequence[Run]) -> Figure:
    figure, axes = _figure("validation loss")
    for run in runs:
        for name in dict.fromkeys(line["set"] for line in run.evals):
            lines = [line for line in run.evals if line["set"] == name]
            _line(axes, lines, "loss", label=f"{run.name}: {name}", marker="o")
    return _done(figure, axes)


def _speeds(runs: Sequence[Run]) -> Figure:
    figure, axes = _figure("tokens/s: all (dotted), not padding (solid), with loss (dashed)")
    for number, run in enumerate(runs):
        for key, style in SPEEDS.items():
            label = run.name if style == "-" else None
            _line(axes, run.steps, key, label=label, linestyle=style, color=f"C{number}")
    return _done(figure, axes)


def _times(runs: Sequence[Run]) -> Figure:
    """Seconds a step: what they went to for one run, their sum for several."""
    figure, axes = _figure("seconds a step")
    split = [line for line in runs[0].steps if "compute_seconds" in line]
    if len(runs) == 1 and split:
        steps = [line["step"] for line in split]
        parts = [[line.get(f"{part}_seconds", 0.0) for line in split] for part in PARTS]
        axes.stackplot(steps, *parts, labels=PARTS)
    else:
        for run in runs:
            _line(axes, run.steps, "seconds", label=run.name)
    # The first step waits for much, and would hide the rest.
    usual = sorted(line["seconds"] for run in runs for line in run.steps)
    axes.set_ylim(0, 3 * usual[len(usual) // 2])
    return _done(figure, axes)


def _line(axes: Axes, lines: Sequence[dict[str, Any]], key: str, *, scale: float = 1.0, **style):
    have = [line for line in lines if key in line]
    if have:
        axes.plot([line["step"] for line in have], [line[key] * scale for line in have], **style)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    return figure, axes


def _done(figure: Figure, axes: Axes) -> Figure:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return figure
