"""Which checkpoints of a run stay: the newest, and beside them the best by validation loss."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from orbax.checkpoint.checkpoint_managers import PreservationPolicy


class Retention(PreservationPolicy):
    """Orbax's question which checkpoints stay, answered by their steps and losses."""

    def __init__(self, *, newest: int, best: int, losses: Mapping[int, float]):
        """Takes how many to keep.

        Args:
            newest: the last so many.
            best: so many of those with a loss, the lowest.
            losses: of the steps that were evaluated; read when the question is asked. What is not
                finite counts as none.
        """
        self._newest, self._best, self._losses = newest, best, losses

    def kept(self, steps: list[int]) -> set[int]:
        """Those of the complete checkpoints, oldest first, that stay; of equal ones the later."""
        known = [s for s in steps if math.isfinite(self._losses.get(s, math.nan))]
        best = sorted(known, key=lambda s: (self._losses[s], -s))[: self._best]
        return {*steps[-self._newest :], *best}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """For each of orbax's checkpoints, oldest first, whether it stays."""
        kept = self.kept([int(c.step) for c in checkpoints])
        return [int(c.step) in kept for c in checkpoints]


def loss_of(checkpoint: Path) -> float | None:
    """The validation loss that a checkpoint was saved with; None for none, or if unreadable."""
    try:
        return json.loads((checkpoint / "run" / "metadata").read_text())["loss"]
    except (OSError, ValueError, KeyError):  # of an older version, or damaged: said when it is read
        return None
