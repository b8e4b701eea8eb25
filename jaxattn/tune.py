"""Tuner: searches the fastest tile sizes on the GPU of this machine, `python -m jaxattn.tune`.

The candidates (`jaxattn.tune_candidates`) are compiled in parallel. Then the results of each are
compared with those of `rule_tiles`, and each is timed: forward alone, then backward with the best
forward. A layout of heads gets the tiles with the smallest geometric mean of times over its shapes,
because document lengths are unknown while a kernel is traced. The table of the kernels by wgmma is
`jaxattn/tuned.json`, that of the kernels by mma.sync `jaxattn/tuned_mma.json`, with a row for each
compute capability; `choose_tiles` of the kernels reads it.
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
from jaxattn.pallas.mma import tiles as mma_tiles
from jaxattn.pallas.tiles import Tiles
from jaxattn.pallas.wgmma import tiles as wgmma_tiles
from jaxattn.tune_candidates import Layout, Search, smem_bytes

# Heads of InternLM2, each with one document of 32k tokens, with long documents and short ones.
TUNED = {
    f"{model}_32k_{kind}": dataclasses.replace(
        SHAPES[f"7b_32k_{kind}"], heads=heads, kv_heads=kv_heads
    )
    for model, heads, kv_heads in (("1.8b", 16, 8), ("7b", 32, 8), ("20b", 48, 8))
    for kind in ("causal", "packed", "packed_sft")
}
# Other tiles sum in another order, and round probabilities at another scale: results may differ
# by this fraction of the mean value, and of the largest. Wrong results and races differ by more.
MEAN_DIFFERENCE, LARGEST_DIFFERENCE = 0.01, 0.02
# A gain below this fraction is noise: the tiles of the rule then stay.
NOISE = 0.005
# Most candidates that are compiled at a time.
WORKERS = 16


def main(argv: list[str] | None = None) -> int:
    """Search the tiles of all layouts, write the table after each; return the exit status."""
    args = _parse(argv)
    layouts: dict[Layout, dict[str, Shape]] = {}
    for name in args.shapes:
        shape = (SHAPES | TUNED)[name]
        layouts.setdefault((shape.heads, shape.kv_heads, shape.head_dim), {})[name] = shape
    if args.gpu is not None and not args.dry_run:
        print("error: --gpu lists candidates only: add --dry_run", file=sys.stderr)
        return 1
    device = hardware.default_device() if args.gpu is None else hardware.GPUS[args.gpu]
    search = search_of(args.kernels, op.capability_of(device))
    out = args.out or search.table
    for layout, shapes in layouts.items():
        print("{} query heads, {} kv heads, head dim {}".format(*layout), flush=True)
        if args.dry_run:
            dry_run(search, layout)
            continue
        q = jax.ShapeDtypeStruct((1, 1, layout[0], layout[2]), jnp.bfloat16)
        if why := op.why_not(device, q, family=search.family):
            print(f"error: {why}; --dry_run lists the candidates", file=sys.stderr)
            return 1
        row = tune(search, layout, shapes)
        row |= {"device": device.device_kind, "jax": jax.__version__}
        write(row | {"date": datetime.date.today().isoformat()}, out)
        print(f"  wrote {out}", flush=True)
    return 0


def search_of(family: str | None, capability: str) -> Search:
    """Return the candidates of a family (None: the device's) for a compute capability.

    Without a GPU that the kernels run on, the candidates are those of Hopper.
    """
    if not op.runs_on("mma", capability):
        capability = "9.0"
    if family is None:
        family = "wgmma" if op.runs_on("wgmma", capability) else "mma"
    # The kernels by wgmma are listed for the one chip that they run on.
    return Search(family=family, capability="9.0" if family == "wgmma" else capability)


def dry_run(search: Search, layout: Layout) -> None:
    """Print every candidate with its shared memory, or the reason why it cannot run."""
    print(f"  rule: {search.rule(layout)}")
    for kernel, parts in (
        ("forward", search.forward(layout)),
        ("backward", search.backward(layout)),
    ):
        for part in parts:
            why = search.why_not(part, layout)
            size = f"{smem_bytes(part, layout):,} bytes"
            print(f"  {kernel} {part}: {f'no, {why}' if why else size}")


def tune(search: Search, layout: Layout, shapes: dict[str, Shape]) -> dict:
    """Time the candidates of both kernels for one layout of heads.

    Returns:
      The row of the table: heads, the best tiles, and ms by shape, [before, after], of the search
      for the forward tiles (forward alone) and for the backward tiles (both passes).
    """
    start = search.rule(layout)
    tried = [
        dataclasses.replace(start, forward=part)
        for part in search.forward(layout)
        if not search.why_not(part, layout)
    ]
    start, forward_ms = fastest(_forward, start, tried, shapes)
    tried = [
        dataclasses.replace(start, backward=part)
        for part in search.backward(layout)
        if not search.why_not(part, layout)
    ]
    best, both_ms = fastest(_both, start, tried, shapes)
    return {
        **search.fields,
        **dict(zip(_LAYOUT, layout, strict=True)),
        "forward": dataclasses.asdict(best.forward),
        "backward": dataclasses.asdict(best.backward),
        "forward_ms": forward_ms,
        "both_ms": both_ms,
    }


def fastest(
    run: Callable, start: Tiles, candidates: list[Tiles], shapes: dict[str, Shape]
) -> tuple[Tiles, dict[str, list[float]]]:
    """Find the candidate with the smallest geometric mean of times, relative to `start`.

    A candidate is dropped if it cannot run on a shape, or if its results are not those of `start`.

    Returns:
      The tiles, `start` if no candidate is faster; and ms by shape, [with start, with the tiles].
    """
    times: dict[Tiles, dict[str, float]] = {start: {}}
    times |= {tiles: {} for tiles in candidates}
    for name, shape in shapes.items():
        arrays = inputs(shape)
        masks = compiled(run, arrays, shape, list(times))
        expected = run(*arrays, masks[start].result())
        for tiles in list(times):
            kernel = "forward" if run is _forward else "backward"
            label = f"  {name:20} {f'{kernel} {getattr(tiles, kernel)}':44}"
            ms = _attempt(functools.partial(run, *arrays), masks[tiles], expected)
            if isinstance(ms, str):
                print(f"{label} dropped: {ms}", flush=True)
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
    """Compile `run` for the candidates, several at a time, into the cache of its calls.

    Returns:
      A future of `planned` for each candidate; its result raises the error of the compiler.
    """

    def compile_one(tiles: Tiles) -> Mask:
        mask = planned(shape, tiles)
        run.lower(*arrays, mask).compile()
        return mask

    with ThreadPoolExecutor(min(os.cpu_count() or 1, WORKERS)) as pool:
        return {tiles: pool.submit(compile_one, tiles) for tiles in candidates}


def planned(shape: Shape, tiles: Tiles) -> Mask:
    """Return the mask of a shape with the metadata for these tiles."""
    q, k = (
        jax.ShapeDtypeStruct((shape.batch, shape.length, heads, shape.head_dim), jnp.bfloat16)
        for heads in (shape.heads, shape.kv_heads)
    )
    return op.planned(shape.mask(), q, k, tiles)


def difference(found: tuple, expected: tuple) -> str | None:
    """Describe a difference of results beyond rounding; None if there is none."""
    for name, got, want in zip(("o", "dq", "dk", "dv"), found, expected, strict=False):
        want = want.astype(jnp.float32)
        gap, size = jnp.abs(got.astype(jnp.float32) - want), jnp.abs(want)
        mean, largest = float(gap.mean() / size.mean()), float(gap.max() / size.max())
        if not (mean <= MEAN_DIFFERENCE and largest <= LARGEST_DIFFERENCE):  # NaN is wrong too
            return f"{name} differs by {mean:.1%} in the mean, {largest:.1%} at most"
    return None


def write(row: dict, path: pathlib.Path) -> None:
    """Write the row of a layout to the table, in place of an older row."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [old for old in rows if any(old.get(k) != row.get(k) for k in _KEY)] + [row]
    rows.sort(key=lambda row: [row.get(k, "") for k in _KEY])
    path.write_text(json.dumps(rows, indent=1) + "\n")


_LAYOUT = ("num_heads", "num_kv_heads", "head_dim")
_KEY = ("capability", *_LAYOUT)


def _attempt(run: Callable, compiled: Future[Mask], expected: tuple) -> float | str:
    """Return milliseconds, or the reason why these tiles are dropped."""
    try:
        mask = compiled.result()
        wrong = difference(run(mask), expected)
    except Exception as error:  # the compiler raises many types for sizes that it cannot compile
        return f"cannot run: {first_line(error)[:200]}"
    return wrong or milliseconds(lambda: run(mask), jax.block_until_ready)


def _attend(q, k, v, mask: Mask):
    family = mask.plan.tiles.family
    return op.attention(q, k, v, mask, scale=q.shape[-1] ** -0.5, family=family)


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
        description="Search the fastest tile sizes on this GPU, and write them to a table.",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        choices=SHAPES | TUNED,
        default=list(TUNED),
        help=f"shapes to time, also those of jaxattn.bench; default: {', '.join(TUNED)}. All "
        "shapes with the same heads share one choice",
    )
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE.json",
        help=f"table to write; default: {wgmma_tiles.TABLE}, or {mma_tiles.TABLE.name} beside it",
    )
    parser.add_argument(
        "--kernels",
        choices=list(op.FAMILIES),
        help="kernel family; default: wgmma on Hopper, mma on other GPUs",
    )
    parser.add_argument(
        "--gpu",
        choices=list(hardware.GPUS),
        help="with --dry_run: list the candidates of this GPU; default: of this machine's",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the candidates, without a GPU")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
