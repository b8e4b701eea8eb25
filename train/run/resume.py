"""Whether a run begins or goes on, and that its directory allows it."""

import os
from pathlib import Path
from typing import Any

from models.weights import run_layout
from train.checkpoint.checkpoints import Checkpoints
from train.config.config import Config
from train.log import say
from train.run.resolve import Settled

OURS = {"checkpoints", "metrics.jsonl", "eval.jsonl"}
"""A directory that has one of these is a run's."""

LOGS = {".log", ".txt", ".out", ".err"}


def identity_of(config: Config, settled: Settled) -> dict[str, Any]:
    """What a checkpoint must share for a run to go on from it; `Loader.restore` adds the data."""
    return {
        **run_layout.model_identity(settled.model),
        run_layout.TOKENIZER: settled.tokenizer.fingerprint,
        "seq_len": config.seq_len,
        "seed": config.seed,
        "optim.name": config.optim.name,
        "optim.moment_dtype": config.optim.moment_dtype,
        "param_dtype": config.param_dtype,
    }


def starting_step(
    config: Config, settled: Settled, checkpoints: Checkpoints, identity: dict[str, Any]
) -> int:
    """The step to go on from, after checking that going on, or beginning, is possible.

    Raises:
        ValueError: it is not.
    """
    if checkpoints.latest is None:
        return 0
    if not config.resume:
        raise ValueError(
            f"{settled.out} holds a checkpoint of step {checkpoints.latest}, and --no_resume would "
            "overwrite it: choose another --out"
        )
    checkpoints.check(identity)
    if config.epochs is None:  # else their steps are known once the data is open
        check_not_beyond(config, settled, checkpoints)
    say(f"resuming from step {checkpoints.latest} of {settled.out}")
    return checkpoints.latest


def check_not_beyond(config: Config, settled: Settled, checkpoints: Checkpoints) -> None:
    """Checks that the run has as many steps as are done already; says so if these are all.

    Raises:
        ValueError: more are done.
    """
    done = checkpoints.latest or 0
    if done > config.steps:
        raise ValueError(
            f"{settled.out} is at step {done}, beyond --steps={config.steps}: choose another --out "
            "or more --steps"
        )


def check_out(out: Path) -> None:
    """Checks that a run may write there.

    Raises:
        OSError: it cannot.
        ValueError: the directory is one of something else.
    """
    _check_writable(out)
    _check_ours(out)


def _check_writable(out: Path) -> None:
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--out={out}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"--out={out}: no permission to write in {there}")


def _check_ours(out: Path) -> None:
    """Refuses a directory of something else, whose files the run's might replace.

    Logs and hidden files may lie there: a person makes the directory for them before the run.
    """
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if names & OURS:
        return
    foreign = sorted(n for n in names if not n.startswith(".") and Path(n).suffix not in LOGS)
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ValueError(
            f"--out={out} holds files that are not of a run ({shown}): choose another --out"
        )
