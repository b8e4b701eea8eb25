"""Measure one cell of the bench in a child process: `python -m train.bench.cell`.

The fields are JSON on standard input. The last line of output is the cell as JSON. With
--compile_only the step is compiled but not run: into an empty compilation cache for a later
process, or from the cache of an earlier one, which takes the time that a run waits when it starts
again.
"""

import dataclasses
import math
import sys
import time
from typing import Any

import jax

from jaxattn.bench import harness
from jaxattn.device import GiB
from models.config import PRESETS
from train.bench.shapes import (
    FIRST_LOSSES,
    Cell,
    batches,
    cell_of,
    device_count,
    outcome,
    parse_mesh,
    time_steps,
)
from train.config.config import Config
from train.config.sections import MeshConfig, OptimConfig
from train.distributed import device
from train.metrics.metrics import peak_memory
from train.run.build import abstract_training, compile_training, initial_params
from train.run.resolve import resolve
from train.step.state import new_state
from train.step.step import put_batch

RATE, STEPS = 1e-4, 100  # learning rate and steps of the run; they do not change the time
OPTIONS = (
    *("attn", "seq_len", "grad_accum", "dtype", "param_dtype", "z_loss", "deterministic", "remat"),
    *("model", "matmul", "base_dtype", "scan_layers", "tile_size"),
)
"""Fields of a cell that are flags of train.main."""


class Program:
    """The training step of a cell, before and after it is compiled.

    Attributes:
        cell: The cell, with its remat chosen.
        run: The resolved run of the cell.
    """

    def __init__(self, cell: Cell):
        """Resolve the run; nothing is allocated.

        Raises:
            ValueError, NotImplementedError: The cell cannot run.
        """
        mesh, devices = MeshConfig(), jax.devices()
        if cell.mesh is not None:
            mesh = parse_mesh(cell.mesh)
            if (count := device_count(mesh)) > len(devices):
                raise ValueError(
                    f"--mesh={cell.mesh} needs {count} devices, and there are {len(devices)}"
                )
            devices = devices[:count]
        config = config_of(cell, mesh, len(devices))
        run = resolve(config, devices)
        if run.execution.attn == "cudnn" and cell.rows != "dense":
            raise NotImplementedError("cudnn has no document mask, take --rows=dense")
        self.run = dataclasses.replace(run, packed=cell.rows != "dense")
        execution = run.execution
        self.cell = dataclasses.replace(
            cell,
            remat=execution.remat,
            scan_layers=execution.scan,
            tile_size=execution.tile_size,
        )

    def compile(self) -> tuple[jax.stages.Compiled, dict[str, Any]]:
        """Compile the step.

        Returns:
            The step; and compile_seconds, tracing included, with cache_hits, the number of
            programs that the compilation cache had.
        """
        hits = _count("/jax/compilation_cache/cache_hits")
        start = time.perf_counter()
        self._tx, graphdef, self._like = abstract_training(self.run)
        compiled = compile_training(self.run, self._tx, graphdef, self._like)
        seconds = time.perf_counter() - start
        return compiled, {"compile_seconds": seconds, "cache_hits": len(hits)}

    def first_state(self):
        """Return random weights, and moments of zero."""
        return new_state(initial_params(self.run, self._like), self._tx, self._like)

    def measure(self) -> dict[str, Any]:
        """Time the full training step: forward, backward and update.

        Returns:
            The results of `shapes.outcome` and `compile`, and: first_step_seconds;
            peak_memory_bytes; plan_bytes; xla_bytes, the compiler's estimate of memory; loss;
            first_losses.

        Raises:
            jax.errors.JaxRuntimeError: out of memory, among others.
        """
        mesh = self.run.real_mesh
        work = batches(self.cell, self.run.rows)
        compiled, compiling = self.compile()
        state, values, losses = self.first_state(), {}, []
        on_device = [put_batch(batch, grad_accum=self.cell.grad_accum, mesh=mesh) for batch in work]

        def step(i: int):
            nonlocal state, values
            state, values = compiled(state, on_device[i % len(work)])
            losses.append(values["loss"])
            return state, values

        first, seconds = time_steps(step, jax.block_until_ready, self.cell.repeats)
        kind, devices = self.run.device.device_kind, mesh.size
        return outcome(self.cell, work, seconds=seconds, device=kind, devices=devices) | {
            **compiling,
            "first_step_seconds": first,
            "peak_memory_bytes": peak_memory(jax.local_devices()),
            "plan_bytes": self.run.plan.total,
            "xla_bytes": _needed(compiled),
            "loss": float(values["loss"]),
            "first_losses": [float(loss) for loss in losses[:FIRST_LOSSES]],
        }


def config_of(cell: Cell, mesh: MeshConfig, devices: int) -> Config:
    """Return the flags of the run whose step is timed.

    Args:
        cell: The cell.
        mesh: Its mesh; an fsdp of None takes all devices.
        devices: Number of devices.
    """
    options: Any = {name: getattr(cell, name) for name in OPTIONS}
    optim: Any = {"name": cell.optim, "moment_dtype": cell.state, "lr": RATE}
    return Config(
        batch_size=cell.batch_size * mesh.data * (mesh.fsdp or devices),
        steps=STEPS,
        mesh=mesh,
        rope_factor=_rope_factor(cell),
        optim=OptimConfig(**optim),
        lora=cell.lora,
        **options,
    )


def _rope_factor(cell: Cell) -> float | None:
    """Return the factor that rows beyond the positions of the model need; None for others."""
    model = PRESETS[cell.model]
    factor = cell.seq_len / model.max_position_embeddings
    known = model.rope_scaling.factor if model.rope_scaling else 1.0
    return float(math.ceil(factor)) if factor > known else None


def _needed(compiled: jax.stages.Compiled) -> int:
    """Return bytes per device: arguments, outputs without donated ones, temporary memory."""
    found = compiled.memory_analysis()
    if found is None:  # not every backend has the analysis
        return 0
    outer = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return outer + found.temp_size_in_bytes


def _count(event: str) -> list[str]:
    """Return a list that grows by one with each such event of jax."""
    seen: list[str] = []

    def listen(name: str, /, **_) -> None:
        if name == event:
            seen.append(name)

    jax.monitoring.register_event_listener(listen)  # pyright: ignore[reportArgumentType]
    return seen


def main() -> None:
    """Measure the cell of standard input and print it, or the reason why it cannot run."""
    cell = cell_of(harness.child_fields())
    program: Program | None = None

    def measure() -> harness.Cell:
        nonlocal program
        program = Program(cell)
        names = ("remat", "scan_layers", "tile_size")
        chosen = {name: getattr(program.cell, name) for name in names}
        return chosen | (program.compile()[1] if only_compile else program.measure())

    def out_of_memory() -> str:
        assert program is not None
        planned = program.run.plan.total / GiB
        return f"out of memory with remat {program.cell.remat}; the plan is {planned:.1f} GiB"

    only_compile = "--compile_only" in sys.argv
    device.set_up(keep_compiled=False)
    harness.report(measure, dataclasses.asdict(cell), out_of_memory=out_of_memory)


if __name__ == "__main__":
    main()
