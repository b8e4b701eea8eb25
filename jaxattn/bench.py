"""Time, useful rate, memory and error of every implementation: `python -m jaxattn.bench`.

Useful FLOPs count visible query-key pairs only: 4 * N * H a pair forward, 3.5 times that for
forward and backward. What an implementation computes beyond them earns nothing.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn import api, xla
from jaxattn.mask import Mask

HEAD_DIM = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One row of the table.

    Attributes:
      batch: rows.
      length: tokens in a row, queries and keys.
      heads: query heads.
      kv_heads: key and value heads.
      documents: (median, sigma) of the log-normal document lengths that fill each row, or None.
      window: sliding window in tokens, or None.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    documents: tuple[float, float] | None = None
    window: int | None = None

    def mask(self) -> Mask:
        """The causal mask, with documents drawn by `numpy.random.default_rng(0)`."""
        ids = None
        if self.documents is not None:
            lengths = document_lengths(self.length, *self.documents)
            row = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
            ids = jnp.asarray(np.tile(row, (self.batch, 1)))
        return Mask(segment_ids=ids, window=self.window)

    def pairs(self) -> int:
        """Visible query-key pairs of the batch."""
        lengths = [self.length]
        if self.documents is not None:
            lengths = document_lengths(self.length, *self.documents)
        window = self.window or self.length
        # The first `window` queries of a document see 1, 2, ... keys, the others `window`.
        full = [min(n, window) for n in lengths]
        pairs = (m * (m + 1) // 2 + (n - m) * window for n, m in zip(lengths, full, strict=True))
        return self.batch * sum(pairs)

    def flops(self) -> float:
        """Useful FLOPs of a forward pass."""
        return 4.0 * self.heads * HEAD_DIM * self.pairs()


SHAPES = {
    "1.8b_32k_causal": Shape(batch=1, length=32768, heads=16, kv_heads=8),
    "7b_32k_causal": Shape(batch=1, length=32768, heads=32, kv_heads=8),
    "20b_32k_causal": Shape(batch=1, length=32768, heads=48, kv_heads=8),
    "7b_32k_packed": Shape(batch=1, length=32768, heads=32, kv_heads=8, documents=(1500.0, 1.0)),
    "7b_32k_packed_short": Shape(
        batch=1, length=32768, heads=32, kv_heads=8, documents=(350.0, 0.8)
    ),
    "7b_32k_packed_sft": Shape(batch=1, length=32768, heads=32, kv_heads=8, documents=(141.0, 0.7)),
    "7b_32k_window4k": Shape(batch=1, length=32768, heads=32, kv_heads=8, window=4096),
    "7b_4k_causal": Shape(batch=8, length=4096, heads=32, kv_heads=8),
    "7b_512_causal": Shape(batch=32, length=512, heads=32, kv_heads=8),
}


def document_lengths(total: int, median: float, sigma: float) -> list[int]:
    """Log-normal lengths, one draw a document, cut to [16, 16384]; the last one fills the row."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = int(np.clip(rng.lognormal(np.log(median), sigma), 16, 16384))
        lengths.append(min(drawn, total - sum(lengths)))
    return lengths


def milliseconds(run: Callable[[], object], *, seconds: float = 0.5, repeats: int = 5) -> float:
    """Median over `repeats` of the mean time of back-to-back launches that fill `seconds`."""
    jax.block_until_ready(run())
    begin = time.perf_counter()
    jax.block_until_ready(run())
    launches = max(2, round(seconds / repeats / (time.perf_counter() - begin)))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(launches):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / launches * 1e3)
    return statistics.median(times)


def measure(name: str, impl: str, *, check: bool) -> dict:
    """One cell of the table; what cannot run is a cell with the reason."""
    shape = SHAPES[name]
    rng = jax.random.key(0)
    draws = zip(
        jax.random.split(rng, 4),
        (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads),
        strict=True,
    )
    q, k, v, do = (
        jax.random.normal(key, (shape.batch, shape.length, n, HEAD_DIM), jnp.bfloat16)
        for key, n in draws
    )
    try:
        mask = api.prepare(shape.mask(), q, k, impl=impl)
        forward = jax.jit(functools.partial(api.attention, impl=impl))

        @jax.jit
        def both(q, k, v, mask, do):
            out, pullback = jax.vjp(
                lambda q, k, v: api.attention(q, k, v, mask, impl=impl), q, k, v
            )
            return out, *pullback(do)

        compiled = both.lower(q, k, v, mask, do).compile()
        cell = {
            "forward_ms": milliseconds(lambda: forward(q, k, v, mask)),
            "both_ms": milliseconds(lambda: compiled(q, k, v, mask, do)),
            "temp_bytes": getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0),
        }
        cell["forward_tflops"] = shape.flops() / cell["forward_ms"] / 1e9
        cell["both_tflops"] = 3.5 * shape.flops() / cell["both_ms"] / 1e9
        if check:
            cell["errors"] = errors(compiled(q, k, v, mask, do), shape.mask(), q, k, v, do)
        return cell
    except NotImplementedError as error:
        return {"why_not": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"why_not": "out of device memory"}


def errors(results, mask: Mask, q, k, v, do) -> dict:
    """Largest and mean absolute error of o, dq, dk, dv against fp32 on the same inputs."""

    @jax.jit
    def oracle(q, k, v, do):
        with jax.default_matmul_precision("highest"):
            out, pullback = jax.vjp(
                lambda q, k, v: xla.attention(q, k, v, mask, scale=HEAD_DIM**-0.5), q, k, v
            )
            return out, *pullback(do)

    wanted = oracle(*(x.astype(jnp.float32) for x in (q, k, v, do)))
    pairs = zip(("o", "dq", "dk", "dv"), results, wanted, strict=True)
    found = {n: jnp.abs(got.astype(jnp.float32) - want) for n, got, want in pairs}
    return {n: {"max": float(e.max()), "mean": float(e.mean())} for n, e in found.items()}


def line(name: str, impl: str, cell: dict) -> str:
    """A cell as one line of the printed table."""
    if "why_not" in cell:
        return f"{name:20} {impl:7} cannot run: {cell['why_not']}"
    text = (
        f"{name:20} {impl:7} {cell['forward_ms']:8.3f} {cell['both_ms']:9.3f} ms  "
        f"{cell['forward_tflops']:5.0f} {cell['both_tflops']:5.0f} TFLOP/s  "
        f"{cell['temp_bytes'] / 2**20:6.0f} MiB"
    )
    if "errors" in cell:
        text += "  max err " + " ".join(f"{n} {e['max']:.1e}" for n, e in cell["errors"].items())
    return text


def main(argv: list[str] | None = None) -> int:
    """Runs the table and prints it; with --out, writes it as JSON too."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxattn.bench", description="Time every attention implementation."
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--impls", nargs="+", choices=api.IMPLEMENTATIONS, default=list(api.IMPLEMENTATIONS)
    )
    parser.add_argument("--check", action="store_true", help="compare with fp32 as well")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args(argv)
    device = api.target_device()
    head = {
        "device": getattr(device, "device_kind", device.platform),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    print(" ".join(f"{k}={v}" for k, v in head.items()))
    print(f"{'shape':20} {'impl':7} {'forward':>8} {'+backward':>9}     useful rate")
    cells = {}
    for name in args.shapes:
        for impl in args.impls:
            cells[f"{name}/{impl}"] = measure(name, impl, check=args.check)
            print(line(name, impl, cells[f"{name}/{impl}"]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({**head, "cells": cells}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
