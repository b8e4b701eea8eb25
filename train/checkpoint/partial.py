"""What a save that did not end leaves in a directory of checkpoints: found and removed."""

import shutil
import time
from pathlib import Path

LONGEST = 10.0
"""Seconds to wait for writers that do not end."""


def remove_half_written(checkpoints: Path, *, quiet: float = 0.0) -> None:
    """Removes directories that orbax began to write and did not rename to a step.

    Orbax raises at a save's first error while its other threads still write, and they create the
    directories that they miss. So what was removed may come back for a moment.

    Args:
        checkpoints: a directory of checkpoints, there or not. No save may be under way in it but
            one that has failed.
        quiet: seconds without anything new after which the writers have ended; 0 if there are
            none. After `LONGEST` in all it returns with what is still there.
    """
    last = time.monotonic()
    give_up = last + LONGEST
    while True:
        for half in list(checkpoints.glob("*.orbax-checkpoint-tmp*")):
            shutil.rmtree(half, ignore_errors=True)
            last = time.monotonic()
        if time.monotonic() >= min(last + quiet, give_up):
            return
        time.sleep(0.02)
