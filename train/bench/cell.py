"""One cell of the bench, in a process of its own: `python -m train.bench.cell '<json>'`.

A process has the whole GPU memory, its own peak, and may die without taking the table with it.
Its last line of output is the result as JSON. With --compile_only it is the time that compiling
took: with the compilation cache of a process before it, what a run waits for when it starts again;
without, it fills that cache for a process after it.
"""

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn import ALIASES
from jaxattn.device import device_memory
from jaxattn.errors import is_out_of_memory
from models.config import PRESETS
from models.execution import Execution
from models.internlm2 import InternLM2, init
from train.attention import resolve_attention
from train.bench.shapes import Cell, batches, outcome, time_steps
from train.config.sections import MeshConfig, OptimConfig
from train.distributed import device
from train.distributed.mesh import make_mesh, row_shards
from train.memory.plan import GiB, Plan, plan
from train.memory.sizing import PARAM_DTYPES, REMAT_BY_SPEED, choose_remat
from train.metrics.metrics import peak_memory
from train.step.lr_schedule import schedule
from train.step.optim import optimizer
from train.step.state import abstract_state, new_state, params_of
from train.step.step import batch_struct, compile_step, make_step, put_batch

RATE, RUN = 1e-4, 100  # learning rate and steps of the whole run: they take no time


class Program:
    """The step of a cell, before and after it is compiled.

    Attributes:
        cell: with its remat chosen.
        rows: of a batch.
        plan: the memory that it should need.
    """

    def __init__(self, cell: Cell):
        """Chooses what is open; nothing is allocated.

        Raises:
            ValueError, NotImplementedError: the cell cannot run, and why.
        """
        self._model, self._mesh = PRESETS[cell.model], make_mesh(MeshConfig())
        self.rows = cell.batch_size * row_shards(self._mesh)
        self._optim = OptimConfig(name=cell.optim, moment_dtype=cell.state, lr=RATE)  # pyright: ignore[reportArgumentType]
        self.cell = self._with_remat(cell)
        self.plan = self._planned(self.cell)

    def compile(self) -> tuple[jax.stages.Compiled, dict[str, Any]]:
        """The compiled step, and what compiling it took.

        Returns:
            The step; and compile_seconds, tracing included, with cache_hits, how many programs the
            compilation cache had.
        """
        cell, dtype = self.cell, jnp.dtype(self.cell.dtype)
        attn = resolve_attention(
            cell.attn,
            self._model,
            self._mesh,
            rows=self.rows,
            seq_len=cell.seq_len,
            dtype=dtype,
            documents=cell.rows != "dense",
        )
        self._tx = optimizer(self._optim, RATE, RUN, param_dtype=PARAM_DTYPES[cell.param_dtype])

        def make():
            return InternLM2(
                self._model,
                rngs=nnx.Rngs(params=0),
                execution=Execution(
                    attn=attn,
                    dtype=dtype,
                    param_dtype=PARAM_DTYPES[cell.param_dtype],
                    remat=cell.remat or REMAT_BY_SPEED[-1],
                    scan=cell.scan_layers,
                ),
            )

        batch = batch_struct(rows=self.rows, seq_len=cell.seq_len, grad_accum=1, mesh=self._mesh)
        if cell.rows == "dense":
            batch = batch._replace(segment_ids=None)
        hits = _count("/jax/compilation_cache/cache_hits")
        begun = time.perf_counter()
        graphdef, self._like = abstract_state(make, self._tx, self._mesh)
        step = make_step(graphdef, self._tx, schedule(self._optim, RATE, RUN), spike=10.0)
        compiled = compile_step(step, self._like, batch)
        seconds = time.perf_counter() - begun
        return compiled, {"compile_seconds": seconds, "cache_hits": len(hits)}

    def first_state(self):
        """Random weights, and moments of zero."""
        params = params_of(init(self._model, mesh=self._mesh), self._like)
        return new_state(params, self._tx, self._like)

    def measure(self) -> dict[str, Any]:
        """Times the full training step: forward, backward and update.

        Returns:
            `shapes.outcome`, what `compile` says, and: first_step_seconds; peak_memory_bytes;
            plan_bytes; xla_bytes, what the compiler says that the step needs; loss.

        Raises:
            jax.errors.JaxRuntimeError: out of memory, among others.
        """
        work = batches(self.cell, self.rows)
        compiled, compiling = self.compile()
        state, values = self.first_state(), {}
        on_device = [put_batch(batch, grad_accum=1, mesh=self._mesh) for batch in work]

        def step(i: int):
            nonlocal state, values
            state, values = compiled(state, on_device[i % len(work)])
            return state, values

        first, seconds = time_steps(step, jax.block_until_ready, self.cell.repeats)
        kind, devices = self._mesh.devices.flat[0].device_kind, self._mesh.size
        return outcome(self.cell, work, seconds=seconds, device=kind, devices=devices) | {
            **compiling,
            "first_step_seconds": first,
            "peak_memory_bytes": peak_memory(jax.local_devices()),
            "plan_bytes": self.plan.total,
            "xla_bytes": _needed(compiled),
            "loss": float(values["loss"]),
        }

    def _with_remat(self, cell: Cell) -> Cell:
        if cell.remat is not None:  # offload wants a loop: see in_scan
            return dataclasses.replace(
                cell, scan_layers=cell.scan_layers or cell.remat == "offload"
            )
        all_of = {remat: dataclasses.replace(cell, remat=remat) for remat in REMAT_BY_SPEED}
        need = {remat: self._planned(chosen).total for remat, chosen in all_of.items()}
        return all_of[choose_remat(need, device_memory(self._mesh.devices.flat[0]))]

    def _planned(self, cell: Cell) -> Plan:
        return plan(
            self._model,
            self._mesh,
            rows=self.rows,
            seq_len=cell.seq_len,
            grad_accum=1,
            remat=cell.remat or REMAT_BY_SPEED[-1],
            itemsize=jnp.dtype(cell.dtype).itemsize,
            attn=ALIASES.get(cell.attn, cell.attn),
            scan=cell.scan_layers,
            optim=self._optim,
            param_itemsize=PARAM_DTYPES[cell.param_dtype].itemsize,
        )


def _needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device: arguments, results that do not take their place, temporary memory."""
    found = compiled.memory_analysis()
    if found is None:  # a backend that does not say
        return 0
    outer = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return outer + found.temp_size_in_bytes


def _count(event: str) -> list[str]:
    """A list that grows by one with each such event of jax."""
    seen: list[str] = []

    def listen(name: str, /, **_) -> None:
        if name == event:
            seen.append(name)

    jax.monitoring.register_event_listener(listen)  # pyright: ignore[reportArgumentType]
    return seen


def main() -> None:
    """Measures the cell of the command line and prints the result, or why there is none."""
    fields = json.loads(sys.argv[1])
    cell = Cell(**fields | {"data": tuple(fields["data"])})
    device.set_up(keep_compiled=False)
    try:
        program = Program(cell)
        cell = program.cell
        if "--compile_only" in sys.argv:
            _, result = program.compile()
        else:
            result = program.measure()
    except (ValueError, NotImplementedError, OSError) as error:
        result = dataclasses.asdict(cell) | {"why": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        planned = program.plan.total / GiB
        why = f"out of memory with remat {cell.remat}; the plan says {planned:.1f} GiB"
        result = dataclasses.asdict(cell) | {"why": why}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
