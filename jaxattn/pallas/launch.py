"""How the kernels are started: one producer and two consumer warpgroups, ordered by barriers."""

from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

from jaxattn.pallas.tiles import CONSUMERS

# The warpgroup that copies; those before it compute.
PRODUCER = CONSUMERS
# Registers a thread: the producer needs few, 24 + 2 * 240 = 3 * 168 is all there is.
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
    """What runs the kernel: takes its inputs, returns its outputs.

    Args:
      kernel: takes refs of inputs and outputs, and scratch by its names; the axes are "program"
        and "wg".
      name: in profiles.
      programs: size of the grid.
      scratch: shared memory and barriers of one program.
      out: shapes and dtypes of the outputs.
      parameters: more of `plgpu.CompilerParams`.
    """
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Every hand-over is by a barrier that the kernel's table names; the automatic ones
            # would stop a warpgroup at each store to shared memory.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            **parameters,
        ),
        kernel_name=name,
    )
