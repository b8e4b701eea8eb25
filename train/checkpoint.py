"""Checkpoints: state, position in the data, and what run they belong to. All or nothing.

Orbax writes into a temporary directory beside the old checkpoints and renames it when every byte
is on disk; older ones go only after that. So a killed run or a full disk leaves the last good one.

    <out>/checkpoints/<step>/state/    TrainState: sharded arrays
    <out>/checkpoints/<step>/run/      JSON: data position and identity
"""

import functools
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from train.state import TrainState

Identity = Mapping[str, Any]
"""What a run must have in common with a checkpoint to go on from it: flat, JSON-able."""

_SYSTEM_WORDS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "Permission denied",
)


class Checkpoints:
    """The checkpoints of one run's directory."""

    def __init__(self, out: Path, *, keep: int):
        """Looks at the directory, without changing or creating anything.

        Args:
            out: the run's directory.
            keep: checkpoints to keep; older ones are removed after a newer is complete.

        Raises:
            OSError: if out is there but cannot be read.
        """
        self._dir = (out / "checkpoints").absolute()
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        found = self._dir.iterdir() if self._dir.is_dir() else ()
        self._steps = sorted(int(p.name) for p in found if p.name.isdigit())

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._steps[-1] if self._steps else None

    def check(self, identity: Identity) -> None:
        """Checks that the latest checkpoint is of this run.

        Raises:
            ValueError: naming every field that differs, with both values.
        """
        theirs = self._run["identity"]
        names = sorted(identity.keys() | theirs.keys())
        differ = [n for n in names if identity.get(n) != theirs.get(n)]
        if differ:
            raise ValueError(
                f"{self._dir.parent} holds a checkpoint of another run (step {self.latest}): "
                + ", ".join(f"{n} is {theirs.get(n)} there, {identity.get(n)} here" for n in differ)
                + "; choose another --out, or the same flags"
            )

    def position(self) -> dict[str, Any]:
        """Where in the data the latest checkpoint stands, as `Loader.restore` takes it.

        Raises:
            ValueError: if the checkpoint cannot be read.
        """
        return self._run["data"]

    def restore(self, like: TrainState) -> TrainState:
        """Reads the latest checkpoint's state.

        Args:
            like: shapes, dtypes and shardings to restore into, on any mesh.

        Raises:
            ValueError: if the checkpoint cannot be read.
        """
        return self._read("state", ocp.args.StandardRestore(like))

    def check_space(self, state: TrainState) -> None:
        """Finds a full disk before a byte is written; what fills it later, the writing finds.

        Args:
            state: arrays or ShapeDtypeStructs.

        Raises:
            OSError: if one more checkpoint has no room; says the bytes needed and free.
        """
        need = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
        there = next(p for p in (self._dir, *self._dir.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if free < need:
            raise OSError(
                f"No space left on device: a checkpoint needs {need:,} bytes, {there} has {free:,}"
            )

    def save(self, state: TrainState, *, data: Mapping[str, Any], identity: Identity) -> None:
        """Begins to write a checkpoint; training may go on while it is written.

        Args:
            state: arrays; copied before this returns, so they may be donated.
            data: `Loader.state()` from before the next batch was drawn.
            identity: of this run.

        Raises:
            OSError: if this or the save before it failed; the last good checkpoint is untouched.
        """
        step = int(jax.device_get(state.step))
        if step == self.latest:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            run=ocp.args.JsonSave({"data": dict(data), "identity": dict(identity)}),
        )
        self.wait()
        self._guard(lambda: self.check_space(state), step)
        self._guard(lambda: self._open().save(step, args=args), step)
        self._steps.append(step)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            OSError: if a save failed.
        """
        if self._manager is not None:
            self._guard(self._manager.wait_until_finished, self.latest)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        """Waits for the save under way, and lets go of the directory.

        Raises:
            OSError: if that save failed, and no error is on its way already.
        """
        try:
            self.wait()
        except OSError:
            if kind is None:
                raise
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._dir.mkdir(parents=True, exist_ok=True)
            _quiet_orbax()
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep)
            self._manager = ocp.CheckpointManager(self._dir, options=options)
        return self._manager

    @functools.cached_property
    def _run(self) -> dict[str, Any]:
        return self._read("run", ocp.args.JsonRestore())

    def _read(self, item: str, how: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._open().restore(self.latest, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:
            where = self._dir / str(self.latest)
            raise ValueError(f"cannot read the checkpoint {where}: {_cause(error)}") from error

    def _guard(self, action, step: int | None) -> None:
        """Runs action; a failure leaves no half-written files and is one line."""
        try:
            action()
        except Exception as error:  # tensorstore reports a full disk as ValueError
            self._manager = None
            self._steps = [s for s in self._steps if s != step]
            for half in self._dir.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
            good = max((int(p.name) for p in self._dir.glob("*") if p.name.isdigit()), default=None)
            left = "there is none before it" if good is None else f"step {good} is intact"
            raise OSError(
                f"cannot write the checkpoint of step {step} to {self._dir} ({left}): "
                f"{_cause(error)}"
            ) from error


def _quiet_orbax() -> None:
    """Keeps pages of traceback off the screen for what is raised as an exception anyway."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    usual = sys.unraisablehook

    def hook(unraisable) -> None:
        # Writes that end after the save they belong to has failed find its event loop closed.
        if "Event loop is closed" not in str(unraisable.exc_value):
            usual(unraisable)

    if usual.__module__ != __name__:
        sys.unraisablehook = hook


def _cause(error: Exception) -> str:
    """The system's own words where they are inside, else the first line."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, OSError):
        return text
    return next((words for words in _SYSTEM_WORDS if words in text), text[:300])
