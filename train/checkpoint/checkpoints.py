"""Save and restore checkpoints: train state, data position, and the identity of their run.

Orbax writes into a temporary directory beside the old checkpoints and renames it when every byte
is on disk; old checkpoints are removed after that. So a killed run or a full disk leaves the last
complete checkpoint.

    <out>/checkpoints/<step>/state/    TrainState: sharded arrays
    <out>/checkpoints/<step>/run/      JSON: data position, identity, config, validation loss,
                                       versions of the code and its libraries, checksums

A damaged checkpoint is moved to <out>/corrupt-<step>, and the checkpoint before it is used. All
processes of a run write and read together; all of them must see the same --out directory.
"""

import contextlib
import logging
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from models.weights.orbax_errors import cause, is_damage, quiet_orbax, unreadable
from train.checkpoint.checksum import all_finite, checksum, read_metadata, with_digest
from train.checkpoint.partial import remove_partial
from train.checkpoint.retention import Retention
from train.step.state import TrainState
from train.version import code_version

log = logging.getLogger(__name__)

T = TypeVar("T")

Identity = Mapping[str, Any]
"""Flat JSON values that a run and a checkpoint must share for the run to resume from it."""

_GOOD, _DAMAGED, _CANNOT_READ = 0, 1, 2


class Checkpoints:
    """The checkpoints of one run's directory."""

    def __init__(self, out: Path, *, keep_last: int, keep_best: int = 0):
        """List the directory, without changing or creating anything.

        Older checkpoints than the newest `keep_last` are removed after a newer is complete, except
        for the `keep_best` with the lowest loss among those saved right after an evaluation.

        Raises:
            OSError: out exists but cannot be read.
        """
        self._dir = (out / "checkpoints").absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._manager: ocp.CheckpointManager | None = None
        self._quiet = contextlib.ExitStack()
        found = self._dir.iterdir() if self._dir.is_dir() else ()
        self._steps = sorted(int(p.name) for p in found if p.name.isdigit())
        self._losses: dict[int, float] = {}
        for step in self._steps:
            with contextlib.suppress(OSError, ValueError):  # reported when it is to be restored
                loss = read_metadata(self._dir / str(step))["loss"]
                if loss is not None:
                    self._losses[step] = loss

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._steps[-1] if self._steps else None

    @property
    def quarantined(self) -> list[Path]:
        """Damaged checkpoints that were moved aside, in this run or before."""
        return sorted(self._dir.parent.glob("corrupt-*"))

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the newest readable checkpoint.

        Returns:
            "data", "config" and the other arguments of `save`.

        Raises:
            ValueError: no checkpoint can be read.
        """
        return self._read_latest(self._metadata)

    def check(self, identity: Identity) -> dict[str, Any]:
        """Check that the newest readable checkpoint belongs to this run; return its `metadata`.

        Raises:
            ValueError: a field differs (the message has all of them, with both values), or no
                checkpoint can be read.
        """
        run = self.metadata()
        theirs = run["identity"]
        names = sorted(identity.keys() | theirs.keys())
        differ = [n for n in names if identity.get(n) != theirs.get(n)]
        if differ:
            shown = [{n: x[n] for n in differ if x.get(n) is not None} for x in (theirs, identity)]
            pairs = [(n, *(x.get(n, "none") for x in shown)) for n in differ]
            raise ValueError(
                f"{self._dir.parent} holds a checkpoint of another run (step {self.latest}): "
                + ", ".join(f"{name} is {there} there, {here} here" for name, there, here in pairs)
                + "; choose another --out, or use the same flags"
            )
        ours, of_theirs = code_version(), run["code"]
        changed = [n for n in ours if ours[n] != of_theirs.get(n)]
        if changed:
            log.info(
                "the checkpoint of step %s was written by other code: %s",
                self.latest,
                ", ".join(f"{n} {of_theirs.get(n)}, here {ours[n]}" for n in changed),
            )
        return run

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restore the newest readable checkpoint; `latest` is its step afterwards.

        Args:
            like: shapes, dtypes and shardings to restore into, on any mesh.

        Returns:
            (state, data position for `Loader.restore`).

        Raises:
            ValueError: no checkpoint can be read.
            OSError: the newest checkpoint is intact, as far as is known, but cannot be read now.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        while True:
            run = self._read_latest(self._metadata)
            step = self.latest
            state = self._read_latest(lambda step: self._open().restore(step, args=args)["state"])
            if step != self.latest:
                continue  # that checkpoint's arrays were damaged
            if run["checksum"] == checksum(state):
                return state, run["data"]
            del state
            self._quarantine(ValueError("its arrays do not match their checksum"))

    def remove_partial(self, quiet_seconds: float = 0.0) -> None:
        """Remove partial checkpoints. The caller must hold the lock of the run's directory."""
        if jax.process_index() == 0:
            remove_partial(self._dir, quiet_seconds=quiet_seconds)

    def check_space(self, state: TrainState) -> None:
        """Raise OSError if the disk has no room for one more checkpoint of arrays or structs."""
        state = state._replace(frozen=None)
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
        """Start to write a checkpoint; training may go on while it is written.

        Args:
            state: arrays; copied before the method returns, so they may be donated. Frozen
                weights are not written.
            data: `Loader.state()` from before the next batch was drawn.
            identity: of this run.
            config: flags of this run, for people to read.
            loss: validation loss after this step, if there was an evaluation.

        Raises:
            OSError: this save or the one before it failed; complete checkpoints are untouched.
            FloatingPointError: the weights are not finite: nothing could resume from them.
        """
        step = int(jax.device_get(state.step))
        if step == self.latest:
            return
        state = state._replace(frozen=None)
        with jax.set_mesh(state.mesh):
            if not all_finite(state.params):
                raise FloatingPointError(
                    f"weights are not finite after step {step}, which is not saved (latest "
                    f"checkpoint: {self.latest}); start again with a smaller --optim.lr"
                )
        run = with_digest(
            {
                "data": dict(data),
                "identity": dict(identity),
                "config": config,
                "loss": loss,
                "checksum": checksum(state),
                "code": code_version(),
            }
        )
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        self.wait()
        if loss is not None:
            self._losses[step] = loss
        self._write(lambda: self.check_space(state), step)
        self._write(lambda: self._open().save(step, args=args), step)
        self._steps.append(step)

    def wait(self) -> None:
        """Wait until the last save is on disk; raise OSError if it failed."""
        if self._manager is not None:
            self._write(self._manager.wait_until_finished, self.latest)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        """Wait for the save under way; its OSError does not replace an error of the block."""
        try:
            self.wait()
        except OSError:
            if kind is None:
                raise
        if self._manager is not None:
            self._manager.close()
        self._drop_manager()

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._dir.mkdir(parents=True, exist_ok=True)
            self._quiet.enter_context(quiet_orbax())
            options = ocp.CheckpointManagerOptions(
                preservation_policy=Retention(
                    newest=self._keep_last, best=self._keep_best, losses=self._losses
                ),
                # Otherwise a directory that cannot be made leaves threads that wait 300 s for it,
                # and the process ends after them.
                async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            )
            self._manager = ocp.CheckpointManager(self._dir, options=options)
        return self._manager

    def _drop_manager(self) -> None:
        self._manager = None
        self._quiet.close()

    def _metadata(self, step: int) -> dict[str, Any]:
        return read_metadata(self._dir / str(step))

    def _read_latest(self, read: Callable[[int], T]) -> T:
        """Apply `read` to the newest step; quarantine damaged checkpoints until one is readable."""
        why: Exception | None = None
        while self.latest is not None:
            found, why, status = None, None, _GOOD
            try:
                found = read(self.latest)
            except Exception as error:  # orbax and tensorstore raise many types
                why = error
                if path := unreadable(self._dir / str(self.latest)):
                    why = PermissionError(f"no permission to read {path}")
                status = _DAMAGED if is_damage(why) else _CANNOT_READ
            status = _worst_of_processes(status)
            if status == _GOOD:
                assert found is not None
                return found
            if status == _CANNOT_READ:
                self._drop_manager()
                raise OSError(
                    f"cannot read the checkpoint {self._dir / str(self.latest)}: "
                    f"{_reason(why)}; it stays where it is: make it readable for this user and "
                    "machine, or choose another --out"
                ) from why
            self._quarantine(why)
        raise ValueError(
            f"no checkpoint of {self._dir.parent} can be read: choose another --out to begin anew"
        ) from why

    def _quarantine(self, why: Exception | None) -> None:
        """Move the latest checkpoint to corrupt-<step> and log the reason."""
        bad = self._steps.pop()
        self._drop_manager()
        self._losses.pop(bad, None)
        source, target = self._dir / str(bad), _free(self._dir.parent / f"corrupt-{bad}")
        if jax.process_index() == 0:
            source.rename(target)
        _worst_of_processes(_GOOD)
        before = f"using step {self.latest}" if self._steps else "there is none before it"
        log.warning(
            "the checkpoint %s is damaged (%s): moved to %s, %s",
            source,
            _reason(why),
            target,
            before,
        )

    def _write(self, action: Callable[[], object], step: int | None) -> None:
        """Run `action`; after a failure remove partial files and raise one line."""
        try:
            action()
        except Exception as error:  # tensorstore reports a full disk as ValueError
            self._steps = [s for s in self._steps if s != step]
            self.remove_partial(quiet_seconds=1.0)  # other threads of this save may still write
            traceback.clear_frames(
                error.__traceback__
            )  # they hold coroutines that would warn later
            self._drop_manager()
            good = max((int(p.name) for p in self._dir.glob("*") if p.name.isdigit()), default=None)
            left = "there is none before it" if good is None else f"step {good} is intact"
            raise OSError(
                f"cannot write the checkpoint of step {step} to {self._dir} ({left}): "
                f"{cause(error)}"
            ) from error


def _reason(why: Exception | None) -> str:
    return "another process could not read it" if why is None else cause(why)


def _worst_of_processes(status: int) -> int:
    """Return the largest status of all processes; they wait for each other."""
    if jax.process_count() == 1:
        return status
    return int(multihost_utils.process_allgather(np.int32(status)).max())


def _free(path: Path) -> Path:
    """Return the path, or with a number appended the first one that does not exist."""
    names = (path, *(path.with_name(f"{path.name}.{n}") for n in range(2, 1000)))
    return next(p for p in names if not p.exists())
