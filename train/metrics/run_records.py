"""Records of a finished or running run, read from its directory."""

import dataclasses
from pathlib import Path
from typing import Any

from models.files import read_json
from train.metrics.records import read_records

TAIL = 50
"""Steps whose mean loss stands for a run: single steps differ by their documents."""

PARTS = ("compute", "data", "evaluation", "checkpoint")
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
METRICS = {
    **{"loss": _MAYBE, "lr": _MAYBE, "grad_norm": _MAYBE, "mfu": _MAYBE, "skipped": _MAYBE},
    **{"seconds": _NUMBER, **{f"{part}_seconds": _NUMBER for part in PARTS}},
    **{"tokens_per_second": _NUMBER, "peak_memory_bytes": _NUMBER},
}
"""Types in a line of metrics.jsonl; null stands for NaN, and for a value that the run lacks."""
EVALS = {"set": str, "loss": _MAYBE}
SOURCES = {"loss": _MAYBE, "loss_tokens": _NUMBER}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecords:
    """Records of one run."""

    name: str  # of the run's directory
    steps: list[dict[str, Any]]  # lines of metrics.jsonl
    evals: list[dict[str, Any]]  # lines of eval.jsonl
    config: dict[str, Any]  # content of config.json; empty without that file


def read_run(out: Path) -> RunRecords:
    """Read the records in a run's directory.

    Raises:
        ValueError: there are no metrics, or a file is damaged or of something else.
        OSError: a file cannot be read.
    """
    metrics, evals, config = out / "metrics.jsonl", out / "eval.jsonl", out / "config.json"
    if not metrics.is_file():
        why = "there is no metrics.jsonl in it" if out.is_dir() else "there is no such directory"
        raise ValueError(f"{out} is not the directory of a run: {why}")
    run = RunRecords(
        name=out.resolve().name,
        steps=read_records(metrics),
        evals=read_records(evals),
        config=read_json(config) if config.is_file() else {},
    )
    if not run.steps:
        raise ValueError(f"{metrics} has no line yet: the run has not made a step")
    for path, lines, types in ((metrics, run.steps, METRICS), (evals, run.evals, EVALS)):
        for line in lines:
            if wrong := _wrong(line, types):
                raise ValueError(
                    f"{path} is no record of a run: the line of step {line['step']} has no valid "
                    f"'{wrong}'; remove that line, or the file"
                )
    return run


def source_losses(run: RunRecords) -> dict[str, float]:
    """Return the mean loss of each training file over its tokens of the last `TAIL` steps."""
    totals: dict[str, list[float]] = {}
    for line in run.steps[-TAIL:]:
        for name, of in line.get("sources", {}).items():
            if of["loss"] is not None:
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += of["loss"] * of["loss_tokens"]
                total[1] += of["loss_tokens"]
    return {name: total / count for name, (total, count) in totals.items()}


def _wrong(line: dict[str, Any], types: dict[str, Any]) -> str | None:
    """Return the name of a value of another type in a line of records."""
    sources = line.get("sources", {})
    entries = sources.values() if isinstance(sources, dict) else [None]
    if not all(isinstance(of, dict) and not _wrong(of, SOURCES) for of in entries):
        return "sources"
    return next((name for name in types if not isinstance(line.get(name), types[name])), None)
