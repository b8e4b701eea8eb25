"""Describe a run in its log and in config.json: flags, choices, data, attention."""

import dataclasses
import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import jaxattn
from models.lora import adapter_params_count
from models.sharding import spec
from train.atomic import replace_text
from train.config.words import flatten_config
from train.data.loader import Loader
from train.data.pack.packing import Batch
from train.data.report import Report
from train.metrics.evaluate import Sets
from train.run.resolve import Run
from train.version import code_version

log = logging.getLogger(__name__)


def describe_run(run: Run) -> list[str]:
    """Return log lines: the choices with their reasons, the run in one line, the memory plan."""
    config = run.config
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    accum = "" if config.grad_accum == 1 else f" in {config.grad_accum} microbatches"
    parameters, lora, trained = run.model.num_params(), run.execution.lora, ""
    if lora is not None:
        count = adapter_params_count(lora, run.model)
        trained = f", beside {count:,} trained in adapters ({count / parameters:.2%})"
    return [
        *run.notes,
        f"{run.name}{' from random weights' * (run.weights is None)}: "
        f"{parameters:,} parameters{trained} on {run.mesh.size} {run.device.device_kind} "
        f"({mesh}), {run.execution.dtype} compute, attention {run.execution.attn}; {run.rows} rows "
        f"x {config.seq_len} tokens a step{accum}; peak learning rate {run.lr:g}; tokenizer "
        f"{run.tokenizer.name}",
        f"memory plan: {run.plan}",
    ]


def log_data(loader: Loader, validation: Sets) -> None:
    """Log what became of the training data and of each validation set."""

    def log_report(title: str, report: Report) -> None:
        for line in report.lines():
            log.info(f"{title}{line}")

    log_report("", loader.report)
    for name, of_set in validation.items():
        log_report(f"validation on {name}: ", of_set.report)


def log_dispatch(run: Run, batch: Batch) -> None:
    """Log which attention runs, why, its tiles, and the fraction that a microbatch skips."""
    ids_BT = batch.segment_ids[: run.rows // run.config.grad_accum]
    where = NamedSharding(run.real_mesh, spec(("batch", "seq", "heads", None), run.real_mesh))
    q_BTNH, k_BTKH = (
        jax.ShapeDtypeStruct(
            (*ids_BT.shape, heads, run.model.head_dim), run.execution.dtype, sharding=where
        )
        for heads in (run.model.num_heads, run.model.num_kv_heads)
    )
    with jax.set_mesh(run.real_mesh):
        mask = jaxattn.Mask(segment_ids=jnp.asarray(ids_BT) if run.packed else None)
        found = jaxattn.describe(run.execution.attn, q_BTNH, k_BTKH, mask)
    found = dataclasses.replace(found, reason=run.attn_reason)
    log.info(f"dispatch internlm2 attn forward: {found}")


def log_end(run: Run, seconds: float, *, chat: bool) -> None:
    """Log the files of a finished run, its time, and the commands that come next.

    Args:
        run: The run.
        seconds: Its time.
        chat: True if its data have chats, so that a prompt is the message of a user.
    """
    out = run.out
    took = timedelta(seconds=round(seconds))
    log.info(f"done in {took}: {out} has checkpoints, metrics.jsonl, config.json, sample.txt")
    as_chat = " --chat" if chat or run.config.chat else ""
    log.info(f'try it:  python -m models.generate {out}{as_chat} --prompt "..."')
    log.info(f"curves:  python -m train.report {out}")
    if run.execution.lora is not None:
        log.info(f"adapter: python -m models.convert {out} {out}/adapter")
    else:
        tokenizer = Path(run.chosen()["tokenizer"])
        assets = tokenizer.parent if tokenizer.name == "tokenizer.model" else tokenizer
        assets = f" --assets_from {assets}" if assets.is_dir() else ""
        log.info(f"weights: python -m models.convert {out} {out}/hf{assets}")


def flags_in_use(run: Run) -> dict[str, Any]:
    """Return the value in use of every flag: as given, or chosen where none was given."""
    return flatten_config(run.config) | run.chosen() | {"export_layout": run.layout}


def save_config(run: Run) -> None:
    """Write config.json: the flags, the values chosen for those not given, and the versions."""
    record = {
        "flags": flatten_config(run.config),
        "chosen": run.chosen()
        | {
            "parameters": run.model.num_params(),
            "device": run.device.device_kind,
            "plan_bytes": run.plan.total,
        },
        "versions": code_version(),
    }
    if jax.process_index() == 0:
        replace_text(run.out / "config.json", json.dumps(record, indent=1) + "\n")
