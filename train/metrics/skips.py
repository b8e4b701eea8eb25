"""Report skipped steps with the documents of their batches, and end a run that skips too many.

The skip-step guard inside the step decides (`train.step.guard`); this module is its host side.
"""

import logging
from pathlib import Path
from typing import Any

from train.data.loader import Loader
from train.metrics.records import Records

log = logging.getLogger(__name__)

NAMED = 5
"""Documents that a log line names; skipped.jsonl has all of them."""


class Skips:
    """Watch the metrics for skipped steps and write skipped.jsonl.

    A line of skipped.jsonl has step, reason, and documents: "file:line" of each in the batch.
    """

    def __init__(self, path: Path, loader: Loader, *, patience: int, start: int):
        """Open skipped.jsonl at `path`; lines of steps after `start` are removed.

        `patience` skipped steps in a row end the run; the loader names the documents of a batch.
        """
        self._path, self._loader, self._patience = path, loader, patience
        self._records = Records(path, start=start)

    def look(self, line: dict[str, Any], position: dict[str, Any]) -> None:
        """Log a step if it was skipped; its batch was drawn at `position`, a `Loader.state()`.

        Raises:
            FloatingPointError: `patience` steps in a row were skipped.
        """
        if not line["in_a_row"]:
            return
        what = self.write(line, position)
        if line["in_a_row"] < self._patience:
            part = "partly " if line["not_finite"] else ""
            log.info(f"step {line['step']} {part}skipped: {what}")
            return
        raise FloatingPointError(
            f"{line['in_a_row']:.0f} steps in a row were skipped (--guard.patience="
            f"{self._patience}), the last one step {line['step']}: {what}; all are in "
            f"{self._path}. The last finite weights are saved: look at these documents, or go on "
            "with a smaller --optim.lr"
        )

    def write(self, line: dict[str, Any], position: dict[str, Any]) -> str:
        """Record a skipped step; return the reason and some of its documents."""
        reason = f"loss {line['loss']:.4g}, gradient norm {line['grad_norm']:.4g}"
        if line["not_finite"]:
            reason += f", update not finite for {line['not_finite']:,.0f} weights, which were kept"
        documents = self._loader.documents(position)
        self._records.write({"step": line["step"], "reason": reason, "documents": documents})
        more = f" and {len(documents) - NAMED:,} more" if len(documents) > NAMED else ""
        return f"{reason}; documents {', '.join(documents[:NAMED])}{more}"
