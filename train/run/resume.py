"""Decide whether a run starts or resumes, and check that its directory and checkpoint allow it."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.weights import run_layout
from models.weights.run_layout import find_checkpoint
from train.checkpoint.checkpoints import Checkpoints
from train.data.loader import Loader
from train.run.resolve import Run
from train.run.summary import flags_in_use

log = logging.getLogger(__name__)

OURS = {"checkpoints", "metrics.jsonl", "eval.jsonl"}
"""Names in a run's directory, by which it is recognized."""

LOGS = {".log", ".txt", ".out", ".err"}

HARMLESS = (
    *("recipe", "model", "tokenizer", "out", "resume", "save_", "keep_", "export_", "log"),
    *("verbose", "dry_"),
    *("eval_every", "prompts", "sample_every", "chat", "profile", "traceback", "dist.", "mesh."),
    *("epochs", "remat", "scan_layers", "data.val", "data.cache", "data.stall", "data.strict"),
    *("config", "print_config", "rows_per_device"),
)
"""Beginnings of flags that a resumed run may change without a line in the log: they change no
number of the training, or are compared elsewhere."""

SAMPLE = 1 << 20  # bytes of a weights file that its fingerprint reads at each end


def identity_of(run: Run) -> dict[str, Any]:
    """Return the values that a run and a checkpoint must share; `check_data` adds the data."""
    config, lora = run.config, run.execution.lora
    return {
        **run_layout.model_identity(run.model),
        run_layout.TOKENIZER: run.tokenizer.fingerprint,
        run_layout.LORA: lora and dataclasses.asdict(lora) | {"targets": [*lora.targets]},  # JSON
        "base_dtype": None if lora is None else config.base_dtype,
        "weights": fingerprint_weights(run.weights) if run.weights else None,
        "seq_len": config.seq_len,
        "seed": config.seed,
        "optim.name": config.optim.name,
        "optim.moment_dtype": config.optim.moment_dtype,
        "param_dtype": config.param_dtype,
    }


def fingerprint_weights(directory: Path) -> str:
    """Hash name, size, and the first and last MiB of each large file of a weights directory."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        size = path.stat().st_size
        if size < 4096 and path.suffix not in (".safetensors", ".bin"):
            continue  # config and code, which may be edited
        digest.update(f"{path.relative_to(directory)} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read())
    return digest.hexdigest()


def read_checkpoint(
    run: Run, checkpoints: Checkpoints, identity: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Return the metadata of the checkpoint to resume from, or None for a new run.

    Raises:
        ValueError: The checkpoint belongs to another run, or the directory holds checkpoints that
            cannot be read, or --no_resume would overwrite one.
    """
    if checkpoints.latest is None:
        if checkpoints.quarantined and run.config.resume:
            raise ValueError(
                f"{run.out} holds no readable checkpoint, only damaged ones "
                f"({checkpoints.quarantined[0].name}): choose another --out, or --no_resume to "
                "train from the first step"
            )
        return None
    if not run.config.resume:
        raise ValueError(
            f"{run.out} holds a checkpoint of step {checkpoints.latest}, and --no_resume would "
            "overwrite it: choose another --out"
        )
    _check_weights(run, checkpoints.metadata(), identity)
    return checkpoints.check(identity)


def _check_weights(run: Run, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Check that the run of --model has not trained on since this run began from it.

    Raises:
        ValueError: It has; names the checkpoint that this run began from.
    """
    then, now = (saved["config"] or {}).get("model"), run.name
    if saved["identity"].get("weights") in (None, identity["weights"]) or then == now:
        return
    first, latest = Path(str(then)), find_checkpoint(now)
    if latest is None or first.parent.resolve() != latest.parent.resolve():
        return  # another model: `Checkpoints.check` has all that differs
    remedy = f"take --model={first}"
    if not first.is_dir():
        remedy = f"choose another --out, because {first} is no longer there"
    raise ValueError(
        f"{run.out} began from {first}, and --model={run.config.model} means {latest}: {remedy}"
    )


def check_resume(run: Run, step: int, saved: Mapping[str, Any], loader: Loader) -> None:
    """Check steps and data of a run that resumes, and log each flag that differs.

    Args:
        run: The run, with its steps known.
        step: Step of the checkpoint.
        saved: Metadata of the checkpoint.
        loader: The training data.

    Raises:
        ValueError: The run has fewer steps than are done, or other data.
    """
    if step > run.steps:
        raise ValueError(
            f"{run.out} is at step {step}, beyond --steps={run.steps}: choose another --out or "
            "more --steps"
        )
    then, now = saved["config"], json.loads(json.dumps(flags_in_use(run)))
    if saved["data"]["fingerprint"] != loader.fingerprint:
        files = {True: "the built-in text", False: ""}
        names = [" ".join(f["data.files"] or ()) or files[True] for f in (then, now)]
        what = "other rows" if names[0] == names[1] else names[0]
        raise ValueError(
            f"--data: {run.out} was trained on {what}, now it is {names[1]}: choose another --out, "
            "or give the same files, --tokenizer, --data.* flags and --seed"
        )
    log.info(f"resuming from step {step} of {run.out}")
    for flag, value in now.items():
        if not flag.startswith(HARMLESS) and value != then.get(flag):
            log.info(f"--{flag} is {value} from here on, was {then.get(flag)} until step {step}")


def check_still_new(run: Run, saved: Mapping[str, Any] | None) -> None:
    """Check, once the lock is held, that no other run has trained in the directory meanwhile.

    Raises:
        ValueError: There are checkpoints although this run began without.
    """
    latest = Checkpoints(run.out, keep_last=run.config.keep_last).latest
    if saved is None and latest is not None:
        raise ValueError(
            f"another run has trained in {run.out} to step {latest} since this one was started: "
            "choose another --out, or start again to resume"
        )


def check_out(out: Path) -> None:
    """Check that a run may write to its directory.

    Raises:
        OSError: The directory cannot be written.
        ValueError: The directory holds files of something else, which the run's might replace.
            Logs and hidden files are allowed: people create the directory for them before the run.
    """
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--out={out}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"--out={out}: no permission to write in {there}")
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if names & OURS:
        return
    foreign = sorted(n for n in names if not n.startswith(".") and Path(n).suffix not in LOGS)
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise ValueError(
            f"--out={out} holds files that are not of a run ({shown}): choose another --out"
        )
