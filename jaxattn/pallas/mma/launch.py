"""Launch of the kernels: 1 or 2 warpgroups, all of which copy and compute."""

import types
from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    programs: int,
    scratch: dict,
    out: tuple[jax.ShapeDtypeStruct, ...] | jax.ShapeDtypeStruct,
    warpgroups: int = 1,
) -> Callable:
    """Return a function that runs the kernel: from its inputs to its outputs.

    Args:
      kernel: takes refs of inputs and outputs, and `smem`, a namespace with the refs of scratch;
        its axis is "program", with several warpgroups also "wg".
      name: the kernel's name in profiles.
      programs: size of the grid.
      scratch: shared memory of one program, by name.
      out: shapes and dtypes of the outputs.
      warpgroups: warpgroups of a program.
    """

    def with_names(*refs):
        refs, scratch_refs = refs[: -len(scratch)], refs[-len(scratch) :]
        smem = types.SimpleNamespace(**dict(zip(scratch, scratch_refs, strict=True)))
        kernel(*refs, smem=smem)

    threads = {"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}
    return plgpu.kernel(
        with_names,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        scratch_types=tuple(scratch.values()),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # The kernels call `cp_async.barrier` at every hand-over.
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            # `plgpu.mma` and fragments name the layout of every value.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name=name,
        **threads,
    )
