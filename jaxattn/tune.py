"""Finds the fastest tile sizes on the GPU at hand: `python -m jaxattn.tune`.

The candidates (`jaxattn.tune_candidates`) are compiled together, then each is compared with the
rule's tiles and timed: forward alone, then backward with the best forward. A layout of heads gets
the tiles with the smallest geometric mean of times over its shapes, because the lengths of
documents are not known when a kernel is traced. The table is `jaxattn/tuned.json`, which
`choose_tiles` reads.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp

from jaxattn import device as hardware
from jaxattn.bench.cell import inputs
from jaxattn.bench.harness import milliseconds, output_file
from jaxattn.bench.shapes import SHAPES, Shape
from jaxattn.errors import first_line
from jaxattn.mask import Mask
from jaxattn.pallas import op
from jaxattn.pallas.tiles import TABLE, Tiles, rule_tiles
from jaxattn.tune_candidates import (
    Layout,
    backward_candidates,
    forward_candidates,
    smem_bytes,
    text,
    why_not,
)

# InternLM2's heads, each with one document of 32k tokens, with long documents and short ones.
TUNED = {
    f"{model}_32k_{kind}": dataclasses.replace(
        SHAPES[f"7b_32k_{kind}"], heads=heads, kv_heads=kv_heads
    )
    for model, heads, kv_heads in (("1.8b", 16, 8), ("7b", 32, 8), ("20b", 48, 8))
    for kind in ("causal", "packed", "packed_sft")
}
# Other tiles sum in another order, and round probabilities at another scale: results may differ
# by this share of the mean value, and of the largest. What is wrong, or a race, differs by more.
MEAN_DIFFERENCE, LARGEST_DIFFERENCE = 0.01, 0.02
# A gain below this share is noise: the rule's tiles then stay.
NOISE = 0.005
WORKERS = 16  # candidates that are compiled at a time, at most


def main(argv: list[str] | None = None) -> int:
    """Searches, prints what it finds, and writes the table after every layout."""
    args = _parse(argv)
    layouts: dict[Layout, dict[str, Shape]] = {}
    for name in args.shapes:
        shape = (SHAPES | TUNED)[name]
        layouts.setdefault((shape.heads, shape.kv_heads, shape.head_dim), {})[name] = shape
    for layout, shapes in layouts.items():
        print("{} query heads, {} kv heads, head dim {}".format(*layout), flush=True)
        if args.dry_run:
            dry_run(layout)
            continue
        device = hardware.default_device()
        q = jax.ShapeDtypeStruct((1, 1, layout[0], layout[2]), jnp.bfloat16)
        if why := op.why_not(device, q):
            print(f"error: {why}; --dry_run lists the candidates", file=sys.stderr)
            return 1
        row = tune(layout, shapes)
        row |= {"device": device.device_kind, "jax": jax.__version__}
        write(row | {"date": datetime.date.today().isoformat()}, args.out)
        print(f"  wrote {args.out}", flush=True)
    return 0


def dry_run(layout: Layout) -> None:
    """Prints every candidate with its shared memory, or why it is none."""
    print(f"  rule: {rule_tiles(*layout)}")
    for part in (*forward_candidates(layout), *backward_candidates()):
        why = why_not(part, layout)
        print(f"  {text(part)}: {f'no, {why}' if why else f'{smem_bytes(part, layout):,} bytes'}")


def tune(layout: Layout, shapes: dict[str, Shape]) -> dict:
    """Times the candidates of both kernels for one layout of heads.

    Returns:
      The row of the table: heads, the best tiles, and ms by shape, [before, after], of the search
      for the forward tiles (forward alone) and for the backward tiles (both passes).
    """
    start = rule_tiles(*layout)
    tried = [
        dataclasses.replace(start, forward=part)
        for part in forward_candidates(layout)
        if not why_not(part, layout)
    ]
    start, forward_ms = fastest(_forward, start, tried, shapes)
    tried = [
        dataclasses.replace(start, backward=part)
        for part in backward_candidates()
        if not why_not(part, layout)
    ]
    best, both_ms = fastest(_both, start, tried, shapes)
    return {
        **dict(zip(_KEY, layout, strict=True)),
        "forward": dataclasses.asdict(best.forward),
        "backward": dataclasses.asdict(best.backward),
        "forward_ms": forward_ms,
        "both_ms": both_ms,
    }


def fastest(
    run: Callable, start: Tiles, candidates: list[Tiles], shapes: dict[str, Shape]
) -> tuple[Tiles, dict[str, list[float]]]:
    """The candidate with the smallest geometric mean of times, relative to `start`.

    One that cannot run, or whose results are not those of `start`, on any shape is out.

    Returns:
      The tiles, `start` if nothing is faster; and ms by shape, [with start, with them].
    """
    times: dict[Tiles, dict[str, float]] = {start: {}}
    times |= {tiles: {} for tiles in candidates}
    for name, shape in shapes.items():
        arrays = inputs(shape)
        masks = compiled(run, arrays, shape, list(times))
        expected = run(*arrays, masks[start].result())
        for tiles in list(times):
            part = tiles.forward if run is _forward else tiles.backward
            label = f"  {name:20} {text(part):44}"
            ms = _attempt(functools.partial(run, *arrays), masks[tiles], expected)
            if isinstance(ms, str):
                print(f"{label} out, {ms}", flush=True)
                del times[tiles]
                continue
            times[tiles][name] = ms
            print(f"{label} {ms:8.3f} ms, {ms / times[start][name]:.3f} of the first", flush=True)

    def score(tiles: Tiles) -> float:
        return statistics.geometric_mean(times[tiles][n] / times[start][n] for n in shapes)

    best = min(times, key=score)
    best = best if score(best) < 1 - NOISE else start
    print(f"  best: {best}, {score(best):.3f} of the first", flush=True)
    return best, {name: [times[start][name], times[best][name]] for name in shapes}


def compiled(
    run: Callable, arrays: list[jax.Array], shape: Shape, candidates: list[Tiles]
) -> dict[Tiles, Future[Mask]]:
    """Compiles `run` for the candidates, several at a time; jax keeps what its calls then use.

    Returns:
      `planned` of each; its result raises what the compiler said to sizes that it cannot do.
    """

    def compile_one(tiles: Tiles) -> Mask:
        mask = planned(shape, tiles)
        run.lower(*arrays, mask).compile()
        return mask

    with ThreadPoolExecutor(min(os.cpu_count() or 1, WORKERS)) as pool:
        return {tiles: pool.submit(compile_one, tiles) for tiles in candidates}


def planned(shape: Shape, tiles: Tiles) -> Mask:
    """The shape's mask with the metadata for these tiles."""
    q, k = (
        jax.ShapeDtypeStruct((shape.batch, shape.length, heads, shape.head_dim), jnp.bfloat16)
        for heads in (shape.heads, shape.kv_heads)
    )
    return op.planned(shape.mask(), q, k, tiles)


def difference(found: tuple, expected: tuple) -> str | None:
    """How results differ by more than rounding, or None."""
    for name, got, want in zip(("o", "dq", "dk", "dv"), found, expected, strict=False):
        want = want.astype(jnp.float32)
        gap, size = jnp.abs(got.astype(jnp.float32) - want), jnp.abs(want)
        mean, largest = float(gap.mean() / size.mean()), float(gap.max() / size.max())
        if not (mean <= MEAN_DIFFERENCE and largest <= LARGEST_DIFFERENCE):  # NaN is wrong too
            return f"{name} differs by {mean:.1%} in the mean, {largest:.1%} at most"
    return None


def write(row: dict, path: pathlib.Path) -> None:
    """Puts a layout's row into the table, in the place of an older one."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if any(old[k] != row[k] for k in _KEY)] + [row]
    rows.sort(key=lambda row: [row[k] for k in _KEY])
    path.write_text(json.dumps(rows, indent=1) + "\n")


_KEY = ("num_heads", "num_kv_heads", "head_dim")


def _attempt(run: Callable, compiled: Future[Mask], expected: tuple) -> float | str:
    """Milliseconds, or why these tiles are out."""
    try:
        mask = compiled.result()
        wrong = difference(run(mask), expected)
    except Exception as error:  # whatever the compiler says to sizes that it cannot do
        return f"cannot run: {first_line(error)[:200]}"
    return wrong or milliseconds(lambda: run(mask), jax.block_until_ready)


def _attend(q, k, v, mask: Mask):
    return op.attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)


@jax.jit
def _forward(q, k, v, do, mask: Mask):
    del do
    return (_attend(q, k, v, mask),)


@jax.jit
def _both(q, k, v, do, mask: Mask):
    out, pullback = jax.vjp(lambda q, k, v: _attend(q, k, v, mask), q, k, v)
    return out, *pullback(do)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxattn.tune",
        description="Search the kernels' tile sizes on this GPU and write them to a table.",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        choices=SHAPES | TUNED,
        default=list(TUNED),
        help=f"what to time; by default {', '.join(TUNED)}; also those of jaxattn.bench. All "
        "shapes with the same heads share one choice",
    )
    parser.add_argument(
        "--out", type=output_file, metavar="FILE.json", default=TABLE, help="default: %(default)s"
    )
    parser.add_argument("--dry_run", action="store_true", help="list the candidates; needs no GPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
