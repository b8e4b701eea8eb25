"""Launch of the kernels: one producer and two consumer warpgroups, ordered by barriers."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxattn.pallas.tiles import CONSUMERS

# Index of the producer warpgroup; the consumers come before it.
PRODUCER = CONSUMERS
# Registers per thread. The producer needs few: 24 + 2 * 240 = 3 * 168 is all that exist.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    programs: int,
    inputs: Mapping[str, Any],
    out: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    **parameters,
) -> tuple[jax.Array, ...]:
    """Run a kernel on its inputs, and return its outputs.

    Args:
      kernel: takes two namespaces, `gmem` with the refs of inputs and outputs, and `smem` with the
        refs of scratch; its axes are "program" and "wg".
      name: the kernel's name in profiles.
      programs: size of the grid.
      inputs: arrays by name; the kernel finds None for an input that is None.
      out: shapes and dtypes of the outputs by name.
      scratch: shared memory and barriers of one program, by name. Their order is the order of the
        addresses, on which the register allocation of ptxas depends: another order may spill.
      parameters: further fields of `plgpu.CompilerParams`.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    names = (*given, *out)

    def with_names(*refs):
        gmem = dict.fromkeys(inputs) | dict(zip(names, refs, strict=False))
        smem = dict(zip(scratch, refs[len(names) :], strict=True))
        kernel(types.SimpleNamespace(**gmem), types.SimpleNamespace(**smem))

    return plgpu.kernel(
        with_names,
        out_type=tuple(out.values()),
        grid=(programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=tuple(scratch.values()),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # The table of each kernel names the barrier of every hand-over; automatic barriers
            # would stop a warpgroup at each store to shared memory.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            **parameters,
        ),
        kernel_name=name,
    )(*given.values())
