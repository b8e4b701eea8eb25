"""`python -m train.report OUT...`: the curves of one or more runs, as one HTML page and PNGs."""

import base64
import dataclasses
import html
import io
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from train.config.cli import fail, parse
from train.metrics.curves import Run, figures
from train.metrics.records import read_records


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draws loss, validation, learning rate, gradient norm, speed, MFU, time and memory."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="OUT...")] = ()
    """Directories of runs; several are drawn into the same axes."""

    to: Annotated[str | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = None
    """Where report.html and the PNGs go. By default <OUT>/report of the first run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, draws and writes; returns the exit status."""
    try:
        config = parse(ReportConfig, sys.argv[1:] if argv is None else argv, "train.report")
    except ValueError as error:
        return fail(error, 2)
    try:
        runs = _read_runs(config)
        page = report(runs, Path(config.to or f"{config.runs[0]}/report"))
    except (ValueError, OSError) as error:
        return fail(error, 1)
    for text in compared(runs):
        print(text)
    print(f"wrote {page}")
    return 0


def report(runs: Sequence[Run], to: Path) -> Path:
    """Draws the runs; returns the page's path.

    Args:
        runs: at least one.
        to: directory of report.html and the PNGs.

    Raises:
        OSError: what cannot be written.
    """
    to.mkdir(parents=True, exist_ok=True)
    images = []
    for name, figure in figures(runs):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        (to / f"{name}.png").write_bytes(buffer.getvalue())
        images.append((name, buffer.getvalue()))
    page = to / "report.html"
    page.write_text(_page(runs, images))
    return page


def compared(runs: Sequence[Run]) -> Iterator[str]:
    """Yields a line for each run but the first: its loss against the first one's.

    Means over the last `TAIL` steps that both have: single steps differ by their documents.
    """
    first, *others = ({line["step"]: line["loss"] for line in run.steps} for run in runs)
    for run, losses in zip(runs[1:], others, strict=True):
        steps = sorted(first.keys() & losses.keys())[-TAIL:]
        if not steps:
            yield f"{run.name}: no step in common with {runs[0].name}"
            continue
        mean, of_first = (statistics.fmean(of[step] for step in steps) for of in (losses, first))
        yield (
            f"{run.name}: mean loss of steps {steps[0]:,} to {steps[-1]:,} {mean:.4f}, "
            f"{mean / of_first - 1:+.2%} of {runs[0].name}'s {of_first:.4f}"
        )


def read_run(out: Path) -> Run:
    """Reads a run's directory.

    Raises:
        ValueError: it holds no metrics, or a line of them is broken.
    """
    metrics = out / "metrics.jsonl"
    if not metrics.is_file():
        why = "there is no metrics.jsonl in it" if out.is_dir() else "there is no such directory"
        raise ValueError(f"{out} is not the directory of a run: {why}")
    lines = read_records(metrics)
    if not lines:
        raise ValueError(f"{metrics} has no line yet: the run has not made a step")
    config = out / "config.json"
    record = json.loads(config.read_text()) if config.is_file() else {}
    name = out.resolve().name
    return Run(name=name, steps=lines, evals=read_records(out / "eval.jsonl"), config=record)


def _read_runs(config: ReportConfig) -> list[Run]:
    if not config.runs:
        raise ValueError("which runs? python -m train.report OUT [OUT...]")
    return [read_run(Path(name)) for name in config.runs]


def _page(runs: Sequence[Run], images: list[tuple[str, bytes]]) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _summary(run)) + "</tr>"
        for run in runs
    )
    head = "".join(f"<th>{name}</th>" for name in SUMMARY)
    losses = "".join(f"<p>{html.escape(text)}</p>\n" for text in compared(runs))
    drawn = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'
        for name, png in images
    )
    flags = "".join(
        f"<details><summary>{html.escape(run.name)}: configuration</summary>"
        f"<pre>{html.escape(json.dumps(run.config, indent=1, ensure_ascii=False))}</pre></details>"
        for run in runs
        if run.config
    )
    title = html.escape(", ".join(run.name for run in runs))
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"<h1>{title}</h1>\n<table><tr>{head}</tr>{rows}</table>\n{losses}{drawn}{flags}\n"
    )


TAIL = 50
"""Steps whose mean loss is compared."""

SUMMARY = ("run", "steps", "loss", "best validation", "tokens/s", "MFU", "peak GiB", "skipped")
_STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 1500px }
img { width: 48%; min-width: 420px; margin: .5% }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ccc }
pre { font-size: 85% }
"""


def _summary(run: Run) -> list[str]:
    """Cells under `SUMMARY`; speeds are medians."""
    last = run.steps[-1]
    best = min((line["loss"] for line in run.evals), default=None)
    mfu = [line["mfu"] for line in run.steps if "mfu" in line]
    return [
        run.name,
        f"{last['step']:,}",
        f"{last['loss']:.4f}",
        "-" if best is None else f"{best:.4f}",
        f"{statistics.median(line['tokens_per_second'] for line in run.steps):,.0f}",
        f"{statistics.median(mfu):.1%}" if mfu else "-",
        f"{last['peak_memory_bytes'] / 2**30:.1f}",
        f"{last.get('skipped', 0):.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
