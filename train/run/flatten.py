"""The configuration of a run as flags and values, for people and for the record."""

import dataclasses
import json
from typing import Any

import jax

from train.atomic import replace_text
from train.config.config import Config
from train.run.resolve import Settled
from train.version import code_version


def resolved(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every flag of a dataclass and of its sections, with its value."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= resolved(value, f"{prefix}{field.name}.")
        else:
            flat[f"{prefix}{field.name}"] = value
    return flat


def save_config(config: Config, settled: Settled) -> None:
    """Writes config.json: the flags, what was chosen for those not given, and the versions."""
    chosen = {
        "model": settled.name,
        "parameters": settled.model.num_params(),
        "tokenizer": settled.tokenizer.name,
        "attn": settled.attn,
        "dtype": settled.dtype.name,
        "batch_size": settled.rows,
        "optim.lr": settled.lr,
        "optim.betas": config.optim.rates,
        "optim.min_lr_ratio": config.optim.last_ratio,
        "out": str(settled.out),
        "mesh": dict(settled.mesh.shape),
        "device": settled.mesh.devices.flat[0].device_kind,
        "plan_bytes": settled.plan.total,
    }
    record = {"flags": resolved(config), "chosen": chosen, "versions": code_version()}
    if jax.process_index() == 0:
        replace_text(settled.out / "config.json", json.dumps(record, indent=1) + "\n")
