"""The cells of one implementation, in a process of its own: `python -m jaxattn.bench.cell`.

    python -m jaxattn.bench.cell IMPLEMENTATION SHAPE... [--check]

A process has the whole GPU memory: jax keeps what it has once taken, and torch likewise, so in one
process the second would only find the rest. And it may die without taking the table with it.
Every line of output is one result as JSON, written when it is known: first the device and the
versions, then a cell for each shape.
"""

import argparse
import functools
import json
from importlib.metadata import version

import jax
import jax.numpy as jnp

from jaxattn import api, xla
from jaxattn.bench.shapes import SHAPES, SMOKE, Shape
from jaxattn.bench.timing import milliseconds
from jaxattn.mask import Mask

# What `torch_cell` measures.
TORCH = ("torch-sdpa", "torch-flex", "torch-fa4")
# Useful FLOPs of a forward pass that a CPU is asked to do: some seconds of its work.
CPU_FLOPS = 1e10


def main(argv: list[str] | None = None) -> None:
    """Measures and prints; see the head of the file."""
    args = _parse(argv)
    say_machine, run = machine, measure
    if args.impl in TORCH:
        try:
            from jaxattn.bench import torch_cell
        except ImportError:
            print(json.dumps({}))
            for _ in args.shapes:
                print(json.dumps({"why_not": "PyTorch is not installed (pip install torch)"}))
            return
        say_machine, run = torch_cell.machine, torch_cell.measure
    print(json.dumps(say_machine()), flush=True)
    for name in args.shapes:
        cell = run((SHAPES | SMOKE)[name], args.impl, check=args.check)
        print(json.dumps(cell), flush=True)


def machine() -> dict[str, str]:
    """The device that jax runs on, and the versions that matter."""
    device = api.target_device()
    client = device.client.platform_version.splitlines()[0]
    return {
        "device": getattr(device, "device_kind", device.platform),
        "jax": version("jax"),
        "platform": client,
    }


def measure(shape: Shape, impl: str, *, check: bool) -> dict:
    """One cell of the table.

    Args:
      shape: what to run.
      impl: a name in `jaxattn.IMPLEMENTATIONS`.
      check: compare with fp32 as well.

    Returns:
      forward_ms and both_ms (forward and backward); temp_bytes, the memory that both need beyond
      inputs and results, and peak_bytes, with them; with `check` errors, as `errors` returns; or
      why_not, if it cannot run.
    """
    if api.target_device().platform == "cpu" and shape.flops() > CPU_FLOPS:
        return {"why_not": "too much work for a CPU, which can run --shapes smoke"}
    q, k, v, do = inputs(shape)
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
            "forward_ms": milliseconds(lambda: forward(q, k, v, mask), jax.block_until_ready),
            "both_ms": milliseconds(lambda: compiled(q, k, v, mask, do), jax.block_until_ready),
            **memory(compiled),
        }
        if check:
            cell["errors"] = errors(compiled(q, k, v, mask, do), shape.mask(), q, k, v, do)
        return cell
    except NotImplementedError as error:
        return {"why_not": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"why_not": "out of device memory"}


def inputs(shape: Shape) -> list[jax.Array]:
    """Standard normal q, k, v and gradient of the output, bf16."""
    heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    keys = jax.random.split(jax.random.key(0), len(heads))
    return [
        jax.random.normal(key, (shape.batch, shape.length, n, shape.head_dim), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    ]


def memory(compiled) -> dict[str, int]:
    """Bytes that a compiled function needs: beyond its inputs and results, and in all."""
    stats = compiled.memory_analysis()
    if stats is None:  # a backend that does not say
        return {}
    temp = stats.temp_size_in_bytes
    outer = stats.argument_size_in_bytes + stats.output_size_in_bytes
    return {"temp_bytes": temp, "peak_bytes": temp + outer}


def errors(results, mask: Mask, q, k, v, do) -> dict:
    """Largest and mean absolute error of o, dq, dk, dv against fp32 on the same inputs."""

    @jax.jit
    def oracle(q, k, v, do):
        with jax.default_matmul_precision("highest"):
            out, pullback = jax.vjp(
                lambda q, k, v: xla.attention(q, k, v, mask, scale=q.shape[-1] ** -0.5), q, k, v
            )
            return out, *pullback(do)

    wanted = oracle(*(x.astype(jnp.float32) for x in (q, k, v, do)))
    pairs = zip(("o", "dq", "dk", "dv"), results, wanted, strict=True)
    found = {n: jnp.abs(got.astype(jnp.float32) - want) for n, got, want in pairs}
    return {n: {"max": float(e.max()), "mean": float(e.mean())} for n, e in found.items()}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxattn.bench.cell",
        description="Measure one attention implementation; every line of output is JSON.",
    )
    parser.add_argument("impl", metavar="IMPLEMENTATION", choices=(*api.IMPLEMENTATIONS, *TORCH))
    parser.add_argument("shapes", nargs="+", metavar="SHAPE", choices=SHAPES | SMOKE)
    parser.add_argument(
        "--check", action="store_true", help="errors of o, dq, dk, dv against fp32 as well"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
