"""Choose the checkpoints to keep: the newest, and beside them the best by validation loss."""

import math
from collections.abc import Mapping

from orbax.checkpoint.checkpoint_managers import PreservationPolicy


class Retention(PreservationPolicy):
    """Preservation policy of orbax by step and validation loss."""

    def __init__(self, *, newest: int, best: int, losses: Mapping[int, float]):
        """Keep the `newest` checkpoints, and the `best` ones by the losses that are finite.

        The losses by step are read whenever orbax asks.
        """
        self._newest, self._best, self._losses = newest, best, losses

    def kept(self, steps: list[int]) -> set[int]:
        """Return the steps to keep of complete checkpoints, oldest first; ties go to the later."""
        known = [s for s in steps if math.isfinite(self._losses.get(s, math.nan))]
        best = sorted(known, key=lambda s: (self._losses[s], -s))[: self._best]
        return {*steps[-self._newest :], *best}

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Return a flag for each of orbax's checkpoints, oldest first."""
        kept = self.kept([int(c.step) for c in checkpoints])
        return [int(c.step) in kept for c in checkpoints]
