"""Launch of the kernels: one producer and two consumer warpgroups, ordered by barriers."""

import types
from collections.abc import Callable

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
    scratch: dict,
    out: tuple[jax.ShapeDtypeStruct, ...] | jax.ShapeDtypeStruct,
    **parameters,
) -> Callable:
    """Return a function that runs the kernel: from its inputs to its outputs.

    Args:
      kernel: takes refs of inputs and outputs, and `smem`, a namespace with the refs of scratch;
        its axes are "program" and "wg".
      name: the kernel's name in profiles.
      programs: size of the grid.
      scratch: shared memory and barriers of one program, by name. Their order is the order of the
        addresses, on which the register allocation of ptxas depends: another order may spill.
      out: shapes and dtypes of the outputs.
      parameters: further fields of `plgpu.CompilerParams`.
    """

    def with_names(*refs):
        refs, scratch_refs = refs[: -len(scratch)], refs[-len(scratch) :]
        smem = types.SimpleNamespace(**dict(zip(scratch, scratch_refs, strict=True)))
        kernel(*refs, smem=smem)

    return plgpu.kernel(
        with_names,
        out_type=out,
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
    )
