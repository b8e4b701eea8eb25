"""Write exports of a run behind its training: directories of weights for other programs.

    <out>/export/step-<step>/    complete; the newest --export_keep stay

A thread writes into a hidden directory, which gets its name when its last file is written. All
processes write their own files of one export, on the file system that --out is on.
"""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from models.weights.orbax_errors import cause
from train.data.thread import Thread
from train.distributed.hosts import gather

log = logging.getLogger(__name__)

Write = Callable[[Path], None]
"""Write this process's files of an export into an existing directory, without a device."""


class Exports:
    """The exports of one run's directory; a context manager that waits for the last one."""

    def __init__(self, out: Path, *, keep: int):
        """Prepare, without creating anything; the newest `keep` exports are kept."""
        self._dir, self._keep = (out / "export").absolute(), keep
        self._thread = Thread("export")
        self._running: Future[None] | None = None

    def begin(self, start: int) -> None:
        """Remove what a killed run left: partial exports, and those of steps that run again.

        The caller must hold the lock of the run's directory, which resumes from step `start`.
        """
        if jax.process_index() == 0:
            for partial in self._dir.glob(".step-*"):
                shutil.rmtree(partial, ignore_errors=True)
            for step in self._steps():
                if step > start:
                    _remove(self._dir / f"step-{step}")

    def latest(self) -> int:
        """Return the step of the newest complete export, as the first process sees it; 0: none."""
        return int(multihost_utils.broadcast_one_to_all(max(self._steps(), default=0)))

    def save(self, step: int, take: Callable[[], Write]) -> None:
        """Start to write the export of a step; training may go on while it is written.

        `take` copies the weights, once the export before is on disk.

        Raises:
            OSError: the export before this one failed.
        """
        self.wait()
        self._running = self._thread.submit(self._write, step, take())

    def wait(self) -> None:
        """Wait until the last export is on disk; raise OSError on all processes if it failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> "Exports":
        return self

    def __exit__(self, kind, *_) -> None:
        """Wait for the export under way; its OSError does not replace an error of the block."""
        try:
            self.wait()
        except OSError:
            if kind is None:
                raise

    def _write(self, step: int, write: Write) -> None:
        target = self._dir / f"step-{step}"
        partial = self._dir / f".{target.name}.partial"
        first = jax.process_index() == 0

        def fill() -> None:
            partial.mkdir(parents=True, exist_ok=True)
            write(partial)

        def publish() -> None:
            if first:
                self._publish(partial, target)

        try:
            _together(f"{step}/fill", target, fill)
            _together(f"{step}/publish", target, publish)
        except OSError:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _publish(self, partial: Path, target: Path) -> None:
        """Give a complete export its name, and remove old ones."""
        partial.rename(target)
        log.info(f"exported {target}")
        for step in self._steps()[: -self._keep]:
            _remove(self._dir / f"step-{step}")

    def _steps(self) -> list[int]:
        """Return the steps of the complete exports, in order."""
        numbers = (path.name.removeprefix("step-") for path in self._dir.glob("step-*"))
        return sorted(int(number) for number in numbers if number.isdecimal())


def _remove(export: Path) -> None:
    """Remove a directory, which first gets a hidden name: a kill leaves no half of an export."""
    hidden = export.with_name(f".{export.name}.removed")
    export.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _together(key: str, target: Path, action: Callable[[], None]) -> None:
    """Run an action on all processes; raise OSError on all if it failed on one of them."""
    failed = ""
    try:
        action()
    except Exception as error:  # of any kind: all processes must hear of it
        failed = f"cannot write the export {target}: {cause(error)}"
    failures = [reason for reason in gather(f"export/{key}", failed) if reason]
    if failures:
        raise OSError(failures[0])
