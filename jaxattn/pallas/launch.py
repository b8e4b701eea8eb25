"""Launch of the kernels, with the names of their arrays and of their shared memory."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    programs: int,
    warpgroups: int,
    inputs: Mapping[str, Any],
    out: Mapping[str, jax.ShapeDtypeStruct],
    scratch: Mapping[str, Any],
    semantics: plgpu.LoweringSemantics,
    **parameters,
) -> tuple[jax.Array, ...]:
    """Run a kernel on its inputs, and return its outputs.

    Args:
      kernel: takes two namespaces, `gmem` with the refs of inputs and outputs, and `smem` with the
        refs of scratch; its axes are "program" and, with several warpgroups, "wg".
      name: the kernel's name in profiles.
      programs: size of the grid.
      warpgroups: warpgroups of a program.
      inputs: arrays by name; the kernel finds None for an input that is None.
      out: shapes and dtypes of the outputs by name.
      scratch: shared memory and barriers of one program, by name. Their order is the order of the
        addresses, on which the register allocation of ptxas depends: another order may spill.
      semantics: code for a warpgroup (wgmma), or for a thread (mma.sync).
      parameters: further fields of `plgpu.CompilerParams`.
    """
    given = {name: x for name, x in inputs.items() if x is not None}
    names = (*given, *out)

    def with_names(*refs):
        gmem = dict.fromkeys(inputs) | dict(zip(names, refs, strict=False))
        smem = dict(zip(scratch, refs[len(names) :], strict=True))
        kernel(types.SimpleNamespace(**gmem), types.SimpleNamespace(**smem))

    threads = {"num_threads": warpgroups, "thread_name": "wg"} if warpgroups > 1 else {}
    return plgpu.kernel(
        with_names,
        out_type=tuple(out.values()),
        grid=(programs,),
        grid_names=("program",),
        scratch_types=tuple(scratch.values()),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # The kernels name the barrier of every hand-over; automatic barriers would stop a
            # warpgroup at each store to shared memory.
            unsafe_no_auto_barriers=True,
            lowering_semantics=semantics,
            **parameters,
        ),
        kernel_name=name,
        **threads,
    )(*given.values())
