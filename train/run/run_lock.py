"""Lock the directory of a run, so that one run at a time trains there."""

import logging
from pathlib import Path

import filelock
import jax

log = logging.getLogger(__name__)

NAME = ".lock"


class RunLock:
    """Keep other runs out of a run's directory; the system releases the lock of a killed process.

    Of the processes of a run, the first one holds the lock for all.
    """

    def __init__(self, out: Path):
        """Prepare the lock, without acquiring it.

        Args:
            out: Directory of the run, which need not exist.
        """
        self._out = out
        self._lock = filelock.FileLock(out / NAME, blocking=False)

    def acquire(self) -> None:
        """Acquire the lock if the directory exists. Idempotent.

        Raises:
            ValueError: Another run is training in the directory.
        """
        if self._lock.is_locked or jax.process_index() != 0 or not self._out.is_dir():
            return
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise ValueError(
                f"another run is training in {self._out}: wait for it, or choose another --out"
            ) from error
        except (OSError, NotImplementedError) as error:  # some shared file systems have no locks
            log.warning(f"{self._lock.lock_file} cannot be locked ({error}): start no second run")

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        """Release the lock."""
        self._lock.release()
