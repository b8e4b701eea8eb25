"""Checkpoints: state, position in the data, and what run they belong to. All or nothing.

Orbax writes into a temporary directory beside the old checkpoints and renames it when every byte
is on disk; older ones go only after that. So a killed run or a full disk leaves the last good one.

    <out>/checkpoints/<step>/state/    TrainState: sharded arrays
    <out>/checkpoints/<step>/run/      JSON: data position, identity, config, validation loss,
                                       versions of the code and its libraries

One that cannot be read is put aside as <out>/unreadable-<step>, and the one before it is used.
All processes of a run write and read together; their --out is one directory that all of them see.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train.checkpoint.checksum import checksum
from train.checkpoint.orbax_errors import cause, quiet_orbax
from train.checkpoint.partial import remove_half_written
from train.checkpoint.retention import Retention, loss_of
from train.log import say
from train.step.state import TrainState
from train.version import code_version

Identity = Mapping[str, Any]
"""What a run must have in common with a checkpoint to go on from it: flat, JSON-able."""


class Checkpoints:
    """The checkpoints of one run's directory."""

    def __init__(self, out: Path, *, keep_last: int, keep_best: int = 0):
        """Looks at the directory, without changing or creating anything.

        Args:
            out: the run's directory.
            keep_last: checkpoints to keep; older ones are removed after a newer is complete.
            keep_best: of those saved right after an evaluation, how many to keep beside them: the
                ones with the lowest validation loss.

        Raises:
            OSError: if out is there but cannot be read.
        """
        self._dir = (out / "checkpoints").absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._manager: ocp.CheckpointManager | None = None
        found = self._dir.iterdir() if self._dir.is_dir() else ()
        self._steps = sorted(int(p.name) for p in found if p.name.isdigit())
        losses = {s: loss_of(self._dir / str(s)) for s in self._steps}
        self._losses = {s: loss for s, loss in losses.items() if loss is not None}

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._steps[-1] if self._steps else None

    def check(self, identity: Identity) -> None:
        """Checks that the latest checkpoint that can be read is of this run.

        Raises:
            ValueError: naming every field that differs, with both values; or if none can be read.
        """
        run = self._read_latest("run", ocp.args.JsonRestore())
        theirs = run["identity"]
        names = sorted(identity.keys() | theirs.keys())
        differ = [n for n in names if identity.get(n) != theirs.get(n)]
        if differ:
            raise ValueError(
                f"{self._dir.parent} holds a checkpoint of another run (step {self.latest}): "
                + ", ".join(f"{n} is {theirs.get(n)} there, {identity.get(n)} here" for n in differ)
                + "; choose another --out, or the same flags"
            )
        ours, of_theirs = code_version(), run.get("code", {})
        changed = [n for n in ours if ours[n] != of_theirs.get(n)]
        if changed:
            say(
                f"the checkpoint of step {self.latest} was written by other code: "
                + ", ".join(f"{n} {of_theirs.get(n)}, here {ours[n]}" for n in changed)
            )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the latest checkpoint that can be read; `latest` then is its step.

        Args:
            like: shapes, dtypes and shardings to restore into, on any mesh.

        Returns:
            (the state, where in the data it stands, as `Loader.restore` takes it).

        Raises:
            ValueError: if none can be read.
        """
        while True:
            state = self._read_latest("state", ocp.args.StandardRestore(like))
            step = self.latest
            run = self._read_latest("run", ocp.args.JsonRestore())
            if step != self.latest:
                continue  # its other half could not be read
            if run.get("checksum") in (None, checksum(state)):
                return state, run["data"]
            del state
            self._put_aside(ValueError("a number in it has changed since it was written"))

    def remove_half_written(self, quiet: float = 0.0) -> None:
        """Removes what a save that did not end has left. Not while another run trains there.

        Args:
            quiet: seconds, as `half_written.remove_half_written` takes it.
        """
        if jax.process_index() == 0:
            remove_half_written(self._dir, quiet=quiet)

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

    def save(
        self,
        state: TrainState,
        *,
        data: Mapping[str, Any],
        identity: Identity,
        config: Mapping[str, Any] | None = None,
        loss: float | None = None,
    ) -> None:
        """Begins to write a checkpoint; training may go on while it is written.

        Args:
            state: arrays; copied before this returns, so they may be donated.
            data: `Loader.state()` from before the next batch was drawn.
            identity: of this run.
            config: its flags, kept for people to read.
            loss: of the validation after this very step, if there was one.

        Raises:
            OSError: if this or the save before it failed; the last good checkpoint is untouched.
        """
        step = int(jax.device_get(state.step))
        if step == self.latest:
            return
        run = {
            "data": dict(data),
            "identity": dict(identity),
            "config": config,
            "loss": loss,
            "checksum": checksum(state),
            "code": code_version(),
        }
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self.wait()
        if loss is not None:
            self._losses[step] = loss
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
            quiet_orbax()
            stay = Retention(newest=self._keep_last, best=self._keep_best, losses=self._losses)
            options = ocp.CheckpointManagerOptions(preservation_policy=stay)
            self._manager = ocp.CheckpointManager(self._dir, options=options)
        return self._manager

    def _read_latest(self, item: str, how: ocp.args.CheckpointArgs) -> Any:
        """Reads a part of the newest checkpoint; those that cannot be read are put aside."""
        why: Exception | None = None
        while self.latest is not None:
            found, why = None, None
            try:
                found = self._open().restore(self.latest, args=ocp.args.Composite(**{item: how}))
            except Exception as error:
                why = error
            if _on_all_processes(why is None):
                assert found is not None
                return found[item]
            self._put_aside(why)
        raise ValueError(
            f"no checkpoint of {self._dir.parent} can be read: choose another --out to begin anew"
        ) from why

    def _put_aside(self, why: Exception | None) -> None:
        """Moves the latest checkpoint away, and says so."""
        bad, self._manager = self._steps.pop(), None
        self._losses.pop(bad, None)
        source, target = self._dir / str(bad), self._dir.parent / f"unreadable-{bad}"
        if jax.process_index() == 0:
            source.rename(_free(target))
        _on_all_processes(True)
        reason = "another process could not" if why is None else cause(why)
        before = f"using step {self.latest}" if self._steps else "there is none before it"
        say(f"cannot read the checkpoint {source}: {reason}; it is now {target}, {before}")

    def _guard(self, action, step: int | None) -> None:
        """Runs action; a failure leaves no half-written files and is one line."""
        try:
            action()
        except Exception as error:  # tensorstore reports a full disk as ValueError
            self._manager = None
            self._steps = [s for s in self._steps if s != step]
            self.remove_half_written(quiet=1.0)  # other threads of this save may still write
            good = max((int(p.name) for p in self._dir.glob("*") if p.name.isdigit()), default=None)
            left = "there is none before it" if good is None else f"step {good} is intact"
            raise OSError(
                f"cannot write the checkpoint of step {step} to {self._dir} ({left}): "
                f"{cause(error)}"
            ) from error


def _on_all_processes(good: bool) -> bool:
    """Whether it is true on every one of them; they wait for each other."""
    if jax.process_count() == 1:
        return good
    return bool(multihost_utils.process_allgather(np.bool_(good)).all())


def _free(path: Path) -> Path:
    """The path, or one beside it that nothing has."""
    names = (path, *(path.with_name(f"{path.name}.{n}") for n in range(2, 1000)))
    return next(p for p in names if not p.exists())
