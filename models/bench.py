"""`python -m models.bench`: time loading and generation with random weights.

Random weights of a preset are written as sharded safetensors, loaded onto the device in a process
of its own, whose memory is measured, and then used for generation: prefill of a long prompt, and
decoding at two batch sizes. Decoding is compared with the memory bandwidth of the device.
"""

import dataclasses
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import tyro

from jaxattn import Impl
from jaxattn.bench import harness
from jaxattn.device import default_device, memory_bandwidth
from models.cli import fail, parse
from models.config import PRESETS, ModelConfig
from models.execution import INFERENCE
from models.generate import stream
from models.internlm2 import InternLM2
from models.sampling import Sampling
from models.weights import run_layout
from models.weights.abstract import abstract, named_params
from models.weights.load import load_hf
from models.weights.memory import largest_tensor_bytes
from models.weights.save import write_hf

# Weights to load. All of 20B has too many bytes for a bench; two layers have its widths.
CASES = {
    **PRESETS,
    "internlm2-20b, 2 layers": dataclasses.replace(PRESETS["internlm2-20b"], num_layers=2),
}
GB = 1e9
SHARD_BYTES = 2_000_000_000
CHILD = "--child"  # argument of the child processes
_WARM = dataclasses.replace(PRESETS["nano"], num_layers=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Time loading and generation with random weights."""

    model: str = "internlm2-1.8b"
    """Preset to load and generate with."""

    load: tuple[str, ...] = ("internlm2-20b, 2 layers",)
    """Further weights to load, for the host memory."""

    prompt: int = 32_512
    """Tokens of the long prompt."""

    new: int = 128
    """Tokens to decode."""

    attn: Impl = "auto"
    """Attention implementation of the prefill."""

    dir: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory for the weights while the bench runs. By default the system's."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """File to write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0; 1 for an error; 2 for wrong flags."""
    try:
        config = parse(BenchConfig, sys.argv[1:] if argv is None else argv, "models.bench")
    except ValueError as error:
        return fail(error, 2)
    try:
        measure(config)
    except (ValueError, NotImplementedError, OSError, RuntimeError) as error:
        return fail(error, 1)
    return 0


def measure(config: BenchConfig) -> None:
    """Time loading and generation with random weights; print, and write JSON.

    Raises:
      ValueError: a name of weights is unknown, or `out` cannot be written.
      RuntimeError: a process that loads failed.
    """
    model, load, prompt, out = config.model, config.load, config.prompt, config.out
    if unknown := sorted({model, *load} - CASES.keys()):
        raise ValueError(f"weights {unknown[0]!r} must be one of {', '.join(CASES)}")
    if out and not out.parent.is_dir():  # before minutes of measuring
        raise ValueError(f"--out={out}: {out.parent} is not a directory")
    if out and (out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK)):
        raise ValueError(f"--out={out} is a directory or cannot be written: name another file")
    loads = {}
    with tempfile.TemporaryDirectory(dir=config.dir) as directory:
        # Before this process allocates the device's memory.
        for case in dict.fromkeys([model, *load]):
            target = Path(directory, case)
            _in_process("write", CASES[case], target)
            loads[case] = measure_load(CASES[case], target)
            print(_load_line(case, loads[case]), flush=True)
            if case != model:
                shutil.rmtree(target)
        execution = dataclasses.replace(INFERENCE, attn=config.attn)
        network = load_hf(Path(directory, model), execution=execution)
    kind = default_device().device_kind
    about = {"model": model, "device": kind, "jax": jax.__version__}
    about["date"] = f"{datetime.date.today()}"
    print(", ".join(about.values()), flush=True)
    rows = []
    bandwidth = memory_bandwidth(kind) or float("nan")
    for batch, tokens in [(1, prompt), (1, 512), (16, 512)]:
        row = generate_speed(network, batch=batch, prompt=min(tokens, prompt), new=config.new)
        bound = batch * bandwidth / decode_bytes(network, batch, row["prompt"])
        row["bound_tokens_per_second"] = bound
        rows.append(row)
        print(
            f"batch {batch}, prompt {row['prompt']:,}: first token after {row['first']:.3f} s "
            f"({batch * row['prompt'] / row['first']:,.0f} tokens/s), then "
            f"{row['tokens_per_second']:,.0f} tokens/s; the memory bandwidth allows "
            f"{bound:,.0f}",
            flush=True,
        )
    if out:
        out.write_text(json.dumps(about | {"load": loads, "generate": rows}, indent=1) + "\n")


def measure_load(config: ModelConfig, directory: Path) -> dict:
    """Load a HF directory in a new process onto its default device.

    Returns:
      device; bytes of the files; seconds; gb_per_second; before_host_bytes, memory of the process
      after its imports and a load of a tiny model; peak_host_bytes above that, None where Linux's
      /proc is missing; bound_bytes, the largest file, two tensors, and on a CPU the model.

    Raises:
      RuntimeError: the process failed.
    """
    return _in_process("load", config, directory)


def generate_speed(model: InternLM2, *, batch: int, prompt: int, new: int) -> dict:
    """Time greedy generation with `stream`, after a first run that compiles.

    Returns:
      first: seconds to the first tokens; tokens_per_second of all others, over all rows.
    """
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, model.config.vocab_size, (batch, prompt)).tolist()
    for _ in range(2):
        begun = time.perf_counter()
        steps = stream(model, prompts, max_new_tokens=new, sampling=Sampling())
        next(steps)
        first = time.perf_counter() - begun
        count = sum(1 for _ in steps)
        rest = time.perf_counter() - begun - first
    return {
        "batch": batch,
        "prompt": prompt,
        "first": first,
        "tokens_per_second": batch * count / rest,
    }


def decode_bytes(model: InternLM2, batch: int, length: int) -> int:
    """Return the bytes that a decoding step reads: the KV cache, and weights but the embedding."""
    c = model.config
    weights = c.num_params() - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    cache = 2 * c.num_layers * batch * length * c.num_kv_heads * c.head_dim
    return model.execution.dtype.itemsize * (weights + cache)


def _in_process(step: str, config: ModelConfig, directory: Path) -> dict:
    """Run `_write` or `_load` in a process of its own.

    Memory for writing would count as memory of the load, and a process that has allocated a GPU's
    memory leaves none to another.
    """
    fields = {"step": step, "directory": str(directory), "shard_bytes": SHARD_BYTES}
    cell = harness.run_child("models.bench", fields | run_layout.model_identity(config), CHILD)
    if "why" in cell:
        raise RuntimeError(f"could not {step} the weights: {cell['why']}")
    return cell


def _child(fields: dict) -> None:
    config, directory = run_layout.model_of(fields), Path(fields["directory"])
    if fields["step"] == "write":
        harness.report(lambda: _write(config, directory, fields["shard_bytes"]), {})
    else:
        harness.report(lambda: _load(config, directory), {})


def _write(config: ModelConfig, directory: Path, shard_bytes: int = SHARD_BYTES) -> dict:
    # One million random numbers, repeated: drawing all of them would take most of the time.
    drawn = np.random.default_rng(0).normal(0, config.initializer_range, 1 << 20)
    drawn = drawn.astype(jnp.bfloat16)
    shapes = named_params(abstract(config, INFERENCE))
    parameters = ((path, jnp.asarray(np.resize(drawn, p.shape))) for path, p in shapes.items())
    write_hf(config, parameters, directory, dtype="bfloat16", max_shard_bytes=shard_bytes)
    return {}


def _load(config: ModelConfig, directory: Path) -> dict:
    execution = dataclasses.replace(INFERENCE, attn="xla")
    with tempfile.TemporaryDirectory() as warm:
        _write(_WARM, Path(warm, "weights"))
        jax.block_until_ready(load_hf(Path(warm, "weights"), execution=execution))
    before = psutil.Process().memory_info().rss
    begun = time.perf_counter()
    model = jax.block_until_ready(load_hf(directory, execution=execution))
    seconds = time.perf_counter() - begun
    peak, files = _peak_rss(), [f.stat().st_size for f in directory.glob("*.safetensors")]
    device = default_device()
    # A mapped file, as far as it was read, and a tensor as it was read and on its way.
    bound = max(files) + 2 * largest_tensor_bytes(config, "bfloat16")
    if device.platform == "cpu":
        bound += sum(x.nbytes for x in jax.tree.leaves(model))
    return {
        "device": device.device_kind,
        "bytes": sum(files),
        "seconds": seconds,
        "gb_per_second": sum(files) / GB / seconds,
        "before_host_bytes": before,
        "peak_host_bytes": None if peak is None else peak - before,
        "bound_bytes": bound,
    }


def _peak_rss() -> int | None:
    """Return the largest resident set of this process in bytes; None without Linux's /proc.

    psutil has no peak on Linux, and ru_maxrss of getrusage includes the parent's before exec.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM:")), None)


def _load_line(case: str, load: dict) -> str:
    line = (
        f"load {case}: {load['bytes'] / GB:.2f} GB in {load['seconds']:.1f} s, "
        f"{load['gb_per_second']:.2f} GB/s"
    )
    if load["peak_host_bytes"] is None:
        return line
    return (
        f"{line}; peak host memory {load['peak_host_bytes'] / GB:.2f} GB above the "
        f"{load['before_host_bytes'] / GB:.2f} GB before, bound {load['bound_bytes'] / GB:.2f} GB"
    )


if __name__ == "__main__":
    sys.exit(_child(harness.child_fields()) if sys.argv[1:] == [CHILD] else main())
