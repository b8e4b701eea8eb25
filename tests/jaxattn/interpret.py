"""Run the Pallas kernels on a CPU: jax's interpreter for Mosaic GPU, with additions.

The interpreter simulates the memories, barriers and copies of a GPU and runs every warpgroup as a
thread, so numbers, hand-overs and bounds are real; the asynchrony of wgmma, the concurrency of
programs and speed are not. The kernels use features that jax 0.11 and 0.12 do not interpret:

* `pl.run_state` over accumulators, wgmma with its left factor in registers, reduce-add copies;
* code for single threads (`plgpu.inline_mgpu`): `softmax.rescale`, `softmax.set_flags` and
  `stmatrix.store_transposed` are replaced by their formulas;
* `plgpu.mma`, and what the mma.sync kernels do per thread: `interpret_mma` (one warpgroup only);
* in 0.11, barriers whose last phases nobody waits for (0.12 allows them).

And three changes for speed: all threads of all programs share one compiled function, where jax
compiles it in each thread; calls from it get numpy arrays, where jax places each number on a
device; and XLA compiles quickly, because each program runs once.

All this patches private code of jax, so it is bound to the versions it was checked with;
`interpreted` fails the test, with the reason, on any other: CI must not pass with the kernels
untested. Nothing stays patched after it.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

from jaxattn import device
from jaxattn.pallas import softmax, stmatrix
from jaxattn.pallas.wgmma.forward import kernel as forward
from tests.jaxattn import interpret_mma

VERSION = ".".join(jax.__version__.split(".")[:2])
CHECKED_WITH = ("0.11", "0.12")
# Programs of the forward's persistent grid under the interpreter: few, so that each runs several
# work items.
PROGRAMS = 3


@contextlib.contextmanager
def interpreted(*, detect_races: bool = False, gpu: str = "h200") -> Iterator[None]:
    """Inside, `impl="pallas"` runs here, interpreted, as if the device were a GPU.

    Args:
      gpu: key of `device.GPUS`: "h200", or "l40s" for the mma.sync kernels (head dim 128).
      detect_races: fail on accesses to shared memory that no barrier orders. Slower, and from
        jax 0.12 only; it does not see the reads of wgmma.
    """
    if VERSION not in CHECKED_WITH:
        pytest.fail(
            f"the kernels' interpreter patches private code of jax {', '.join(CHECKED_WITH)}, "
            f"this is {jax.__version__}: adapt interpreter_patches.py, then CHECKED_WITH and the "
            "bound of jax in pyproject.toml"
        )
    if jax.default_backend() != "cpu":
        pytest.skip(
            "the interpreter runs on a CPU (JAX_PLATFORMS=cpu); the kernels run under -m gpu"
        )
    if detect_races and VERSION == "0.11":
        pytest.skip("the interpreter of jax 0.11 prints races, it does not raise")
    from tests.jaxattn import interpreter_patches  # not before the version is known

    with contextlib.ExitStack() as stack:
        before = jax.config.values["jax_disable_most_optimizations"]
        jax.config.update("jax_disable_most_optimizations", True)
        stack.callback(jax.config.update, "jax_disable_most_optimizations", before)
        stack.enter_context(mock.patch.object(device, "default_device", lambda: device.GPUS[gpu]))
        for owner, name, replacement in interpret_mma.patches():
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(mock.patch.object(forward, "PROGRAMS", PROGRAMS))
        stack.enter_context(mock.patch.object(softmax, "rescale", rescale))
        stack.enter_context(mock.patch.object(softmax, "set_flags", set_flags))
        stack.enter_context(mock.patch.object(stmatrix, "store_transposed", store_transposed))
        for owner, name, replacement in interpreter_patches.patches(VERSION):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.callback(interpreter_patches.reset)
        params = plgpu.InterpretGPUParams(detect_races=detect_races)
        stack.enter_context(plgpu.force_gpu_interpret_mode(params))
        yield


def rescale(x: jax.Array, alpha: jax.Array) -> jax.Array:
    """Stands for `softmax.rescale`."""
    return x * softmax.by_row(alpha, x.shape)


def set_flags(flags, indices, l: jax.Array) -> None:
    """Stands for `softmax.set_flags`."""
    wrong = jnp.any(~(l <= 2.0**softmax.REACH))
    for index in indices:
        flags[index] = jnp.where(wrong, 1, flags[index])


def store_transposed(ref, value: jax.Array) -> None:
    """Stands for `stmatrix.store_transposed`."""
    ref[...] = value.T


def hopper() -> device.DeviceSpec:
    """Return an H200, to replace `device.default_device`."""
    return device.GPUS["h200"]
