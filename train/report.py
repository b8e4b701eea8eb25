"""`python -m train.report OUT...`: plots of one or more runs, as one HTML page and PNGs."""

import base64
import dataclasses
import html
import io
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from models.cli import fail, interruptible, parse
from train.config.sections import chosen
from train.metrics.curves import figures
from train.metrics.run_records import TAIL, RunRecords, read_run, source_losses
from train.metrics.summary_table import COLUMNS, cells, markdown


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Plot loss, validation loss, learning rate, gradient norm, speed, MFU, time and memory."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="OUT...")] = ()
    """Directories of runs; several runs share the axes."""

    to: Annotated[str | None, chosen("DIR")] = None
    """Directory for report.html and the PNGs. By default OUT/report for one run, else report."""


@interruptible
def main(argv: Sequence[str] | None = None) -> int:
    """Read, plot and write; return the exit status: 0; 1 for wrong records; 2 for wrong flags."""
    try:
        config = parse(ReportConfig, sys.argv[1:] if argv is None else argv, "train.report")
        if not config.runs:
            raise ValueError("name the directory of a run: python -m train.report OUT [OUT...]")
    except ValueError as error:
        return fail(error, 2)
    try:
        runs = [read_run(Path(name)) for name in config.runs]
        alone = f"{config.runs[0]}/report" if len(runs) == 1 else "report"
        page = report(runs, Path(config.to or alone))
    except (ValueError, OSError) as error:
        return fail(error, 1)
    for text in (*markdown(runs), *compared(runs), *by_source(runs)):
        print(text)
    print(f"wrote {page}")
    return 0


def report(runs: Sequence[RunRecords], to: Path) -> Path:
    """Write report.html and PNGs of one or more runs into `to`; return the path of the page.

    Raises:
        OSError: a file cannot be written.
    """
    to.mkdir(parents=True, exist_ok=True)
    images = []
    for name, figure in figures(runs):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        (to / f"{name}.png").write_bytes(buffer.getvalue())
        images.append((name, buffer.getvalue()))
    page = to / "report.html"
    page.write_text(_page(runs, images), encoding="utf-8")
    return page


def compared(runs: Sequence[RunRecords]) -> Iterator[str]:
    """Yield a line for each run after the first: its mean loss beside the first run's.

    The means are over the last `TAIL` common steps, because single steps differ by their documents.
    Losses on other data, or in tokens of another tokenizer, are not compared.
    """
    first = runs[0]
    losses = _losses(first)
    for run in runs[1:]:
        other = [name for name in ("data", "tokenizer") if _of(run, name) != _of(first, name)]
        if other:
            what = " and ".join(other)
            yield f"losses of {run.name} and {first.name} are not compared: other {what}"
            continue
        ours = _losses(run)
        steps = sorted(losses.keys() & ours.keys())[-TAIL:]
        if not steps:
            yield f"losses of {run.name} and {first.name} are not compared: no common step"
            continue
        mean, of_first = (statistics.fmean(of[step] for step in steps) for of in (ours, losses))
        yield (
            f"mean loss of steps {steps[0]:,} to {steps[-1]:,}: {first.name} {of_first:.4f}, "
            f"{run.name} {mean:.4f} ({mean / of_first - 1:+.2%})"
        )


def by_source(runs: Sequence[RunRecords]) -> Iterator[str]:
    """Yield a line for each run of several training files: the mean loss of each file."""
    for run in runs:
        if losses := source_losses(run):
            parts = (f"{name} {loss:.4f}" for name, loss in losses.items())
            yield f"{run.name}, loss by training file, last {TAIL} steps: {', '.join(parts)}"


def _losses(run: RunRecords) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in run.steps if line.get("loss") is not None}


def _of(run: RunRecords, name: str) -> Any:
    """Return the data files or the tokenizer of a run from its config.json."""
    section, flag = ("flags", "data.files") if name == "data" else ("chosen", "tokenizer")
    values = run.config.get(section)
    return values.get(flag) if isinstance(values, dict) else None


def _page(runs: Sequence[RunRecords], images: list[tuple[str, bytes]]) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(run)) + "</tr>"
        for run in runs
    )
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    texts = (*compared(runs), *by_source(runs))
    losses = "".join(f"<p>{html.escape(text)}</p>\n" for text in texts)
    plots = "".join(
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
        f"<h1>{title}</h1>\n<table><tr>{head}</tr>{rows}</table>\n{losses}{plots}{flags}\n"
    )


_STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 1500px }
img { width: 48%; min-width: 420px; margin: .5% }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ccc }
pre { font-size: 85% }
"""


if __name__ == "__main__":
    sys.exit(main())
