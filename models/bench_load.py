"""How fast a HF checkpoint loads, and with how much of the host's memory: `python -m models.bench`.

Run as `python -m models.bench_load write|load CONFIG DIR`, each in a process of its own: what
writing needed would count as memory of the load, and a process that holds a GPU's memory leaves
none to another.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.device import default_device
from models.config import PRESETS, ModelConfig
from models.weights import memory
from models.weights.abstract import abstract, named_params
from models.weights.load import load_hf
from models.weights.save import write_hf

# What is loaded. 20B has too many bytes for a bench, but not too wide ones: two layers of it.
CASES = {
    **PRESETS,
    "internlm2-20b, 2 layers": dataclasses.replace(PRESETS["internlm2-20b"], num_layers=2),
}
SHARD_BYTES = 2_000_000_000
_PROGRAM = ("-m", "models.bench_load")
_WARM = dataclasses.replace(PRESETS["nano"], num_layers=1)


def write(case: str, directory: Path) -> None:
    """Writes random bf16 weights of a case, in files of 2 GB, where there are none yet.

    Raises:
      OSError: no room in the directory.
      RuntimeError: the process that wrote them failed otherwise.
    """
    _process("write", case, directory)


def measure(case: str, directory: Path, *, program: Sequence[str] = _PROGRAM) -> dict:
    """Loads what `write` wrote, in a new process onto its default device.

    Args:
      case: a key of `CASES`.
      directory: where its weights are.
      program: what Python runs in the process, with the arguments of `main`.

    Returns:
      device; bytes of the files; seconds; gb_per_second; peak_host_bytes above what the process
      had before (its imports, its device, a load of a tiny model); bound_bytes, its largest tensor
      and a file, and on a CPU, whose arrays are host memory, the model; None where Linux's /proc
      is missing.
    """
    return json.loads(_process("load", case, directory, program))


def main(argv: Sequence[str]) -> int:
    """One of the processes; returns its exit code."""
    what, case, directory = argv
    (_write if what == "write" else _load)(CASES[case], Path(directory))
    return 0


def _process(what: str, case: str, directory: Path, program: Sequence[str] = _PROGRAM) -> str:
    command = [sys.executable, *program, what, case, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"could not {what} {case}: {last:.300}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


def _write(config: ModelConfig, directory: Path) -> None:
    # The same million numbers again and again: drawing all of them would take longer than all else.
    drawn = np.random.default_rng(0).normal(0, config.initializer_range, 1 << 20)
    drawn = drawn.astype(jnp.bfloat16)
    shapes = named_params(abstract(config, mesh=None, dtype="bfloat16"))
    parameters = ((path, jnp.asarray(np.resize(drawn, p.shape))) for path, p in shapes.items())
    write_hf(config, parameters, directory, dtype="bfloat16", max_shard_bytes=SHARD_BYTES)


def _load(config: ModelConfig, directory: Path) -> None:
    with tempfile.TemporaryDirectory() as warm:
        _write(_WARM, Path(warm, "weights"))
        jax.block_until_ready(load_hf(Path(warm, "weights"), attn="xla"))
    before = memory.resident()
    begun = time.perf_counter()
    model = jax.block_until_ready(load_hf(directory, attn="xla"))
    seconds = time.perf_counter() - begun
    peak, files = memory.peak(), [f.stat().st_size for f in directory.glob("*.safetensors")]
    device = default_device()
    bound = memory.largest_tensor_bytes(config, "bfloat16") + max(files)
    if device.platform == "cpu":
        bound += sum(x.nbytes for x in jax.tree.leaves(model))
    result = {
        "device": device.device_kind,
        "bytes": sum(files),
        "seconds": seconds,
        "gb_per_second": sum(files) / 1e9 / seconds,
        "before_host_bytes": before,
        "peak_host_bytes": None if peak is None else peak - before,
        "bound_bytes": bound,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
