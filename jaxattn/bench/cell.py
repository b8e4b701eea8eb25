"""Child process of the bench that measures one cell; see `jaxattn.bench.harness`."""

import functools
from typing import cast

import jax
import jax.numpy as jnp

from jaxattn import api, xla
from jaxattn import device as hardware
from jaxattn.bench import fa3
from jaxattn.bench.harness import Cell, child_fields, milliseconds, report
from jaxattn.bench.shapes import FA3, Shape, shape_of
from jaxattn.mask import Mask

# Most useful FLOPs of a forward pass on a CPU: some seconds of work.
CPU_FLOPS = 1e10


def measure(shape: Shape, impl: str, *, check: bool) -> Cell:
    """Measure one cell of an implementation, or of `FA3`; with `check`, compare with fp32 as well.

    Returns:
      forward_ms and both_ms (forward and backward); temp_bytes, the memory of both passes beyond
      inputs and results, and peak_bytes, with them; with `check` the result of `errors`; or why.

    Raises:
      NotImplementedError: the implementation cannot run this shape on this device.
    """
    if hardware.default_device().platform == "cpu" and shape.flops() > CPU_FLOPS:
        return {"why": "too much work for a CPU; use --shapes smoke"}
    package = {}
    if impl == FA3:
        try:
            attend, package = fa3.attention(shape), {"package": fa3.version()}
        except ImportError:
            return {"why": f"{impl} is not installed (pip install {fa3.PACKAGE})"}
        if hardware.default_device().platform != "gpu":
            raise NotImplementedError(f"{impl} needs an NVIDIA GPU")
    q, k, v, do = inputs(shape)
    mask = ()  # of FlashAttention-3, whose documents are lengths
    if impl != FA3:
        mask = (api.prepare(shape.mask(), q, k, impl=impl),)
        attend = functools.partial(api.attention, impl=cast(api.Implementation, impl))
    forward = jax.jit(attend)

    @jax.jit
    def both(q, k, v, mask, do):
        out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, *mask), q, k, v)
        return out, *pullback(do)

    compiled = both.lower(q, k, v, mask, do).compile()
    cell = {
        "forward_ms": milliseconds(lambda: forward(q, k, v, *mask), jax.block_until_ready),
        "both_ms": milliseconds(lambda: compiled(q, k, v, mask, do), jax.block_until_ready),
        **memory(compiled),
        **package,
    }
    if check:
        cell["errors"] = errors(compiled(q, k, v, mask, do), shape.mask(), q, k, v, do)
    return cell


def inputs(shape: Shape) -> list[jax.Array]:
    """Draw standard normal q, k, v and gradient of the output, bf16 [B, T, heads, H]."""
    heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    keys = jax.random.split(jax.random.key(0), len(heads))
    return [
        jax.random.normal(key, (shape.batch, shape.length, n, shape.head_dim), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    ]


def memory(compiled) -> dict[str, int]:
    """Return the bytes that a compiled function needs: beyond inputs and results, and in all."""
    stats = compiled.memory_analysis()
    if stats is None:  # not every backend has the figures
        return {}
    temp = stats.temp_size_in_bytes
    outer = stats.argument_size_in_bytes + stats.output_size_in_bytes
    return {"temp_bytes": temp, "peak_bytes": temp + outer}


def errors(results, mask: Mask, q, k, v, do) -> dict:
    """Return the largest and mean absolute error of o, dq, dk, dv against fp32."""

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


if __name__ == "__main__":
    given = child_fields()
    checked = given.pop("check")
    report(lambda: measure(shape_of(given["shape"]), given["impl"], check=checked), given)
