"""Remove partial checkpoints: temporary directories of saves that did not end."""

import shutil
import time
from pathlib import Path

TIMEOUT = 10.0
"""Seconds to wait for writers that do not end."""


def remove_partial(checkpoints: Path, *, quiet_seconds: float = 0.0) -> None:
    """Remove directories that orbax began to write and did not rename to a step.

    Orbax raises at a save's first error while its other threads still write, and these create the
    directories that are missing. So a removed directory may come back for a moment. No save may be
    under way in `checkpoints`, which need not exist, except one that has failed.

    The writers have ended after `quiet_seconds` without a new directory, 0 if there are none. After
    `TIMEOUT` in all the function returns.
    """
    last = time.monotonic()
    deadline = last + TIMEOUT
    while True:
        for partial in list(checkpoints.glob("*.orbax-checkpoint-tmp*")):
            shutil.rmtree(partial, ignore_errors=True)
            last = time.monotonic()
        if time.monotonic() >= min(last + quiet_seconds, deadline):
            return
        time.sleep(0.02)
