"""Steps that changed nothing: what was in their batches, and when it is enough.

The step itself decides (`train.step.guard`); this is what the host says of it.
"""

from pathlib import Path
from typing import Any

import jax

from train.data import Loader
from train.log import note
from train.metrics.records import Records

NAMED = 5
"""Documents that a line of the log names; skipped.jsonl has all of them."""


class Skips:
    """Watches the lines of the metrics for skipped steps, and writes skipped.jsonl.

    A line of it has step, reason, and documents, "file:line" of every one in the batch.
    """

    def __init__(self, path: Path, loader: Loader, *, patience: int, start: int):
        """Lines after `start`, of a run that died, are dropped.

        Args:
            path: of skipped.jsonl; made when the first step is skipped.
            loader: knows what is in a batch.
            patience: skipped steps in a row that are too many.
            start: step the run goes on from.
        """
        self._path, self._loader, self._patience = path, loader, patience
        self._records = Records(path, start=start) if jax.process_index() == 0 else None

    def look(self, line: dict[str, Any], position: dict[str, Any]) -> None:
        """Says so if a step was skipped.

        Args:
            line: of the metrics.
            position: `Loader.state()` before the step's batch was drawn.

        Raises:
            FloatingPointError: as many in a row as the run has patience for.
        """
        if not line["in_a_row"]:
            return
        what = self.write(line, position)
        if line["in_a_row"] < self._patience:
            note(f"step {line['step']} skipped: {what}")
            return
        raise FloatingPointError(
            f"{line['in_a_row']:.0f} steps in a row were skipped (--guard.patience="
            f"{self._patience}), the last one step {line['step']}: {what}; all are in "
            f"{self._path}. The weights before them are saved: look at these documents, or go on "
            "with a smaller --optim.lr"
        )

    def write(self, line: dict[str, Any], position: dict[str, Any]) -> str:
        """Writes down a step that was skipped; returns why, and some of its documents."""
        reason = f"loss {line['loss']:.4g}, gradient norm {line['grad_norm']:.4g}"
        documents = self._loader.documents(position)
        if self._records is not None:
            wrong = {"step": line["step"], "reason": reason, "documents": documents}
            self._records.write(wrong)
        more = f" and {len(documents) - NAMED:,} more" if len(documents) > NAMED else ""
        return f"{reason}; documents {', '.join(documents[:NAMED])}{more}"
