"""One run at a time in a directory."""

import fcntl
from pathlib import Path
from typing import IO

import jax

from train.log import say

NAME = ".lock"


class RunLock:
    """Keeps other runs out of a run's directory; the system frees what a killed process held.

    Of several processes of a run the first does so for all.
    """

    def __init__(self, out: Path):
        """Does nothing yet.

        Args:
            out: the run's directory, there or not.
        """
        self._out = out
        self._file: IO | None = None

    def claim(self) -> None:
        """From now on, if the directory is there; may be called again.

        Raises:
            ValueError: another run is training there.
        """
        if self._file is not None or jax.process_index() != 0 or not self._out.is_dir():
            return
        file = (self._out / NAME).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(
                f"another run is training in {self._out}: wait for it, or choose another --out"
            ) from error
        except OSError as error:  # not every shared file system has locks
            say(f"{file.name} cannot be locked ({error.strerror}): start no second run there")
        self._file = file

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        """Lets others in."""
        if self._file is not None:
            self._file.close()
            self._file = None
