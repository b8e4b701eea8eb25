"""One cell of the bench, in a process of its own: `python -m train.bench_cell '<json>'`.

A process has the whole GPU memory, its own peak, and may die without taking the table with it.
Its last line of output is the result as JSON.
"""

import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.bench_shapes import document_lengths
from models.config import PRESETS
from models.internlm2 import InternLM2, init
from train import device, memory
from train.attention import resolve_attention
from train.data import Batch
from train.flops import causal_pairs, peak_flops, training_flops
from train.mesh import make_mesh, row_shards
from train.metrics import peak_memory
from train.optim import optimizer
from train.schedule import schedule
from train.sections import MeshConfig, OptimConfig
from train.state import abstract_state, new_state, params_of
from train.step import compile_step, make_step, put_batch

STEPS = 3
"""Steps from one wait for the device to the next, queued as in training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What to measure."""

    model: str
    """A preset."""

    attn: str
    """Implementation."""

    seq_len: int
    """Tokens of a row."""

    tokens: int
    """Of a step, per device that holds rows; at least one row each."""

    packed: bool
    """Rows of documents instead of one document each."""

    remat: str
    """Key of `models.remat.REMAT`."""

    scan_layers: bool
    """Compile one block for all layers."""

    dtype: str
    """Compute type."""

    repeats: int
    """Timed runs of `STEPS` steps; their median counts."""


def measure(cell: Cell) -> dict:
    """Times the full training step, forward, backward and update, on random tokens.

    Returns:
        The cell's fields and: rows; ms, of a step, median of the timed runs; tokens_per_second;
            mfu (where the device's peak is known); peak_memory_bytes; compile_seconds; plan_bytes.

    Raises:
        ValueError, NotImplementedError: the cell cannot run, and why.
        jax.errors.JaxRuntimeError: out of memory, among others.
    """
    model, mesh = PRESETS[cell.model], make_mesh(MeshConfig())
    rows = max(1, cell.tokens // cell.seq_len) * row_shards(mesh)
    dtype = jnp.dtype(cell.dtype)
    shape: Any = {"rows": rows, "seq_len": cell.seq_len}
    attn = resolve_attention(cell.attn, model, mesh, **shape, dtype=dtype, documents=cell.packed)
    plan = memory.plan(
        model, mesh, **shape, accum=1, remat=cell.remat, itemsize=dtype.itemsize, attn=attn
    )
    config = OptimConfig(lr=1e-4)
    tx = optimizer(config, 1e-4, 100)

    def make():
        return InternLM2(
            model,
            rngs=nnx.Rngs(params=0),
            attn=attn,
            dtype=dtype,
            remat=cell.remat,
            scan=cell.scan_layers,
        )

    graphdef, like = abstract_state(make, tx, mesh)
    state = new_state(params_of(init(model, mesh=mesh), like), tx, like)
    rows_BT = random_rows(rows, cell.seq_len, model.vocab_size, packed=cell.packed)
    pairs = causal_pairs(rows_BT.segment_ids)
    if not cell.packed:  # a plain causal mask, which every implementation knows
        rows_BT = rows_BT._replace(segment_ids=None)
    batch = put_batch(rows_BT, accum=1, mesh=mesh)
    begun = time.perf_counter()
    step = compile_step(make_step(graphdef, tx, schedule(config, 1e-4, 100)), state, batch)
    compile_seconds = time.perf_counter() - begun
    seconds = []
    for _ in range(1 + cell.repeats):  # the first warms up
        begun = time.perf_counter()
        for _ in range(STEPS):
            state, values = step(state, batch)
        jax.block_until_ready((state, values))
        seconds.append((time.perf_counter() - begun) / STEPS)
    median = statistics.median(seconds[1:])
    tokens = rows * cell.seq_len
    result = dataclasses.asdict(cell) | {
        "rows": rows,
        "ms": 1e3 * median,
        "tokens_per_second": tokens / median,
        "peak_memory_bytes": peak_memory(jax.local_devices()),
        "plan_bytes": plan.total,
        "compile_seconds": compile_seconds,
        "loss": float(values["loss"]),
    }
    peak = peak_flops(mesh.devices.flat[0])
    if peak is not None:
        useful = training_flops(model, tokens, pairs)
        result["mfu"] = useful / median / (peak * mesh.size)
    return result


def random_rows(rows: int, seq_len: int, vocab_size: int, *, packed: bool) -> Batch:
    """Rows [rows, seq_len] without padding, every position with a target.

    Args:
        rows: of the batch.
        seq_len: tokens of a row.
        vocab_size: of the uniform random tokens.
        packed: documents with the lengths of jaxattn.bench's 7b_32k_packed (log-normal, median
            1,500, sigma 1), the same in every row; else one a row.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (rows, seq_len + 1), dtype=np.int32)
    lengths = document_lengths(seq_len, 1500.0, 1.0) if packed else [seq_len]
    of_row = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    segment_ids = np.tile(of_row, (rows, 1))
    counted = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    positions = np.tile(counted, (rows, 1))
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones((rows, seq_len), np.float32),
        segment_ids=segment_ids,
        positions=positions,
    )


def main() -> None:
    """Measures the cell of the command line and prints the result, or why there is none."""
    cell = Cell(**json.loads(sys.argv[1]))
    device.set_up(keep_compiled=False)
    try:
        result = measure(cell)
    except (ValueError, NotImplementedError) as error:
        result = dataclasses.asdict(cell) | {"why": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = f"out of memory: {str(error).splitlines()[0][:200]}"
        result = dataclasses.asdict(cell) | {"why": why}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
