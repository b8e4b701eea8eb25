"""Runs in processes of their own, and what a run leaves behind."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

MAIN = """
import json, sys
from models.config import PRESETS, ModelConfig
PRESETS["tiny"] = ModelConfig(**json.loads(sys.argv[1]))
{first}
from train.main import main
sys.exit(main(sys.argv[2:]))
"""


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def params(out: Path, step: int):
    """Read the parameters in a checkpoint, as numpy."""
    with ocp.PyTreeCheckpointer() as reader, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")
        state = reader.restore(out / "checkpoints" / str(step) / "state")
    return jax.tree.map(np.asarray, state["params"])


def start(tiny, flags: list[str], *, devices: int, log: Path, first: str = "") -> subprocess.Popen:
    """Begins `train.main` in a process with fake devices.

    Args:
        tiny: the model of `--model=tiny`.
        flags: the command line.
        devices: of the process.
        log: gets stdout and stderr.
        first: code to run before the program is imported.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # One process compiles, those after it read.
        "JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    code = MAIN.format(first=first)
    command = [sys.executable, "-c", code, json.dumps(vars(tiny)), *flags]
    with log.open("a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
