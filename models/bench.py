"""`python -m models.bench`: loading from HF files and generating, against the memory's bandwidth.

Random weights of a preset are written as sharded safetensors, loaded into the device as a
checkpoint from the hub would be (in a process of its own, whose memory is watched), and then
generate: a long prompt is read (prefill) through the model's own attention, and tokens are decoded
one at a time at several batch sizes.
"""

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxattn.device import default_device, memory_bandwidth
from models import bench_load
from models.config import PRESETS
from models.generate import stream
from models.internlm2 import InternLM2
from models.sampling import Sampling
from models.weights.load import load_hf

GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes JSON; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        result = measure(args)
    except (ValueError, NotImplementedError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace) -> dict:
    """Loads, generates, and prints a line for each; arguments as `_parser` says."""
    loads = {}
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        # Before this process takes the device's memory for itself.
        for case in dict.fromkeys([args.model, *args.load]):
            target = Path(directory, case)
            bench_load.write(case, target)
            loads[case] = bench_load.measure(case, target)
            print(_load_line(case, loads[case]), flush=True)
            if case != args.model:
                shutil.rmtree(target)
        model = load_hf(Path(directory, args.model), attn=args.attn)
    kind = default_device().device_kind
    about = {"model": args.model, "device": kind, "jax": jax.__version__}
    about["date"] = f"{datetime.date.today()}"
    print(", ".join(about.values()), flush=True)
    rows = []
    for batch, prompt in [(1, args.prompt), (1, 512), (16, 512)]:
        row = generate_speed(model, batch=batch, prompt=min(prompt, args.prompt), new=args.new)
        bandwidth = memory_bandwidth(kind) or float("nan")
        seconds = decode_bytes(model, batch, row["prompt"]) / bandwidth
        row["floor_tokens_per_second"] = batch / seconds
        rows.append(row)
        print(
            f"batch {batch}, prompt {row['prompt']:,}: first token after {row['first']:.3f} s "
            f"({batch * row['prompt'] / row['first']:,.0f} tokens/s), then "
            f"{row['tokens_per_second']:,.0f} tokens/s; reading weights and cache once a token "
            f"allows {row['floor_tokens_per_second']:,.0f}",
            flush=True,
        )
    return about | {"load": loads, "generate": rows}


def _load_line(case: str, load: dict) -> str:
    line = (
        f"load {case}: {load['bytes'] / GB:.2f} GB in {load['seconds']:.1f} s, "
        f"{load['gb_per_second']:.2f} GB/s"
    )
    if load["peak_host_bytes"] is None:
        return line
    return (
        f"{line}; peak host memory {load['peak_host_bytes'] / GB:.2f} GB above the "
        f"{load['before_host_bytes'] / GB:.2f} of the process before, bound "
        f"{load['bound_bytes'] / GB:.2f}"
    )


def generate_speed(model: InternLM2, *, batch: int, prompt: int, new: int) -> dict:
    """Times greedy generation as a caller of `stream` sees it, after a first run that compiles.

    Returns:
        first: seconds to the first tokens; tokens_per_second of those that follow, over all rows.
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
    """What one decoding step must read: all weights but the embedding table, and the cache."""
    c = model.config
    weights = c.num_params() - (0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size)
    cache = 2 * c.num_layers * batch * length * c.num_kv_heads * c.head_dim
    return model.dtype.itemsize * (weights + cache)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.bench",
        description="Time loading and generating with random weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="internlm2-1.8b", choices=PRESETS, help="preset")
    parser.add_argument(
        "--load",
        nargs="*",
        default=["internlm2-20b, 2 layers"],
        choices=bench_load.CASES,
        help="what is loaded beside it, to measure the host's memory",
    )
    parser.add_argument("--prompt", type=int, default=32_512, help="tokens of the long prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to decode")
    parser.add_argument("--attn", default="auto", help="attention implementation of the prefill")
    parser.add_argument(
        "--dir", help="where the weights are written for a while; else the system's"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
