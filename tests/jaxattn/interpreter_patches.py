"""Add to jax's interpreter of Mosaic GPU what our kernels need; `interpret.py` installs it.

All of it leans on private code of jax: import it only with the versions it was checked with.
"""

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.core import Literal, eval_jaxpr
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic.interpret.utils import JaxprEnv
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    jaxpr_interpret,
    race_detection_state,
    shared_memory,
)
from jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret import JaxprInterpreter
from jax._src.state import discharge
from jax._src.state.types import AbstractRef

Races = race_detection_state.GPURaceDetectionState


def patches(version: str) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, replacement) for a jax of this minor version."""
    found = [
        (JaxprInterpreter, "interpret", interpret),
        (gpu_callbacks, "copy_smem_to_gmem", copy_smem_to_gmem),
        (thread_map, "_run_jaxpr", _once_compiled),
        (callback, "io_callback_impl", io_callback_impl),
        (shared_memory, "_to_int", to_int),
        (Races, "check_read", unless_registers(Races.check_read)),
        (Races, "check_write", unless_registers(Races.check_write)),
    ]
    if version == "0.11":
        found.append((shared_memory.Barrier, "deallocate", deallocate_barrier))
    return found


def reset() -> None:
    """Forgets the simulated GPU, of which a kernel that failed leaves some."""
    gpu_callbacks.reset_gpu_interpret_mode_state()


_stock_interpret = JaxprInterpreter.interpret
_stock_copy_smem_to_gmem = gpu_callbacks.copy_smem_to_gmem


def interpret(self: JaxprInterpreter, jaxpr, token, *args):
    """`JaxprInterpreter.interpret`, one equation at a time where some need our handlers."""
    if not any(_handler(eqn) for eqn in jaxpr.eqns):
        return _stock_interpret(self, jaxpr, token, *args)
    env = JaxprEnv(vars=[*jaxpr.constvars, *jaxpr.invars], values=args)
    for eqn in jaxpr.eqns:
        inputs = env.read_many(eqn.invars)
        if handler := _handler(eqn):
            token, outputs = handler(self, eqn, token, *inputs)
        else:
            variables = {
                v: x for v, x in zip(eqn.invars, inputs, strict=True) if not isinstance(v, Literal)
            }
            # All that the stock interpreter asks of a jaxpr.
            alone = types.SimpleNamespace(
                constvars=[], invars=[*variables], outvars=eqn.outvars, eqns=[eqn]
            )
            token, outputs = _stock_interpret(self, alone, token, *variables.values())
        env.write_many(eqn.outvars, outputs)
    return token, env.read_many(jaxpr.outvars)


def _handler(eqn) -> Callable[..., Any] | None:
    """Our interpretation of an equation that the stock interpreter cannot run, else None."""
    if eqn.primitive is discharge.run_state_p:
        return _run_state
    if eqn.primitive is primitives.mma_p:
        return _mma
    left_factor_in_registers = eqn.primitive is primitives.wgmma_ref_p and not isinstance(
        eqn.invars[1].aval, AbstractRef
    )
    return _wgmma if left_factor_in_registers else None


def _call(self: JaxprInterpreter, eqn, result, token, function, **arguments):
    """Run a function of the simulated GPU when the interpreted kernel reaches it."""
    return callback.io_callback(
        functools.partial(function, source_info=eqn.source_info),
        result,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        **arguments,
    )


def _run_state(self: JaxprInterpreter, eqn, token, *inputs):
    """Values become registers for the time of the body, and values again after it."""
    is_value = [not isinstance(v.aval, AbstractRef) for v in eqn.invars]
    place = {"mesh_location": self.mesh_location, "thread": self.thread}
    refs = []
    for x, value in zip(inputs, is_value, strict=True):
        if value:
            token, request = gpu_callbacks.call_make_allocation_request_array(
                token=token,
                compute_unit=self.thread,
                memory_space_id=shared_memory.get_memory_space_idx(core.MemorySpace.REGS),
            )
            token, x = gpu_callbacks.call_allocate_buffer(
                token=token, allocation_request_as_array=request, value=x, **place
            )
        refs.append(x)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *refs)
    outputs = []
    for ref, out, value in zip(refs, eqn.outvars, is_value, strict=True):
        if value:
            key = ref
            token, ref = _call(
                self,
                eqn,
                (gpu_callbacks.TOKEN_SHAPE_DTYPE, out.aval),
                token,
                gpu_callbacks.wgmma_accumulator_deref,
                acc_allocation_key_as_array=key,
                wait_n=0,
            )
            token = gpu_callbacks.call_deallocate_buffer(
                token=token, allocation_key_as_array=key, **place
            )
        outputs.append(ref)
    return token, outputs


def _mma(self: JaxprInterpreter, eqn, token, acc, a, b):
    """`plgpu.mma`: acc + a b for values."""
    return token, [acc + jnp.dot(a, b, preferred_element_type=acc.dtype)]


def _wgmma(self: JaxprInterpreter, eqn, token, acc, a, b, *leaves):
    """Acc += a b for a value `a`."""
    trees = [eqn.params[f"{name}_transforms_tree"] for name in ("acc", "a", "b")]
    empty = jax.tree.structure([])
    acc_transforms, _, b_transforms = jax.tree.unflatten(
        jax.tree_util.treedef_tuple([tree or empty for tree in trees]), leaves
    )
    acc, acc_transforms = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
    b, b_transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_transforms)
    token = _call(
        self,
        eqn,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token,
        _wgmma_from_registers,
        acc=(acc, acc_transforms),
        a=a,
        b=(b, b_transforms),
    )
    return token, []


@gpu_callbacks.fail_on_exception
def _wgmma_from_registers(*, token, mesh_location, thread, acc, a, b, source_info):
    memory = gpu_callbacks._get_shared_memory()
    info = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
    (acc_key, acc_access), (b_key, b_access) = (_locate(memory, *ref) for ref in (acc, b))
    b_value, _, _ = memory.get_buffer_content(b_key, b_access, thread, logging_info=info)
    sums, _, _ = memory.get_buffer_content(acc_key, acc_access, thread, logging_info=info)
    # The forward's first pass overflows where the second is needed, as on a GPU: silently.
    with np.errstate(over="ignore", invalid="ignore"):
        sums = sums + np.matmul(np.asarray(a), b_value, dtype=sums.dtype)
    memory.store_buffer_content(acc_key, acc_access, sums, thread, logging_info=info)
    return token


def _locate(memory, key_as_array, transforms):
    """Key of an allocation, and the part of it that the transforms select."""
    key = gpu_callbacks.HostAllocationKey.from_array(key_as_array)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    return key, memory.access(key, transforms)


@gpu_callbacks.fail_on_exception
def copy_smem_to_gmem(*, reduction_op, **arguments):
    """`gpu_callbacks.copy_smem_to_gmem`, which may also add to what is there."""
    if reduction_op is None:
        return _stock_copy_smem_to_gmem(reduction_op=None, **arguments)
    assert reduction_op == "add" and arguments["predicate"] is None, (reduction_op, arguments)
    memory, thread = gpu_callbacks._get_shared_memory(), arguments["thread"]
    ends = {}
    for end in ("src", "dst"):
        ref = arguments[f"{end}_allocation_key_as_array"], arguments[f"{end}_transforms"]
        ends[f"{end}_allocation_key"], ends[f"{end}_access"] = _locate(memory, *ref)
    task = _ReduceAdd(
        mesh_location=arguments["mesh_location"],
        thread=thread,
        source_info=arguments["source_info"],
        clock=memory.incr_clock(thread) if memory.detect_races else None,
        **ends,
    )
    memory.execute_async_task(task)
    return arguments["token"]


class _ReduceAdd(gpu_callbacks.AsyncCopySmemToGmemTask):
    """A copy that adds; as in the hardware, what lies beyond the destination is dropped."""

    _lock = threading.Lock()

    def __call__(self, tma_thread_id: int):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        info = self.logging_info
        value, _, _ = memory.get_buffer_content(
            self.src_allocation_key, self.src_access, self.thread, logging_info=info
        )
        self.write_clock = self.read_clock  # additions commute: two of them are not a race
        shape = tuple(memory.buffer_shape_and_dtype(self.dst_allocation_key).shape)
        inside = gpu_callbacks._clip_store_to_shape(self.dst_access, value, shape)
        if inside is not None:
            access, value = inside
            key = self.dst_allocation_key
            with self._lock:
                old, _, _ = memory.get_buffer_content(key, access, self.thread, logging_info=info)
                memory.store_buffer_content(
                    key, access, old + value, self.thread, logging_info=info
                )
        self.post_write(tma_thread_id, memory)


def io_callback_impl(*args, callback, **unused):
    """`callback.io_callback_impl`, which gives the function numpy arrays, not jax's.

    A kernel makes thousands of calls with a dozen numbers each: placing every number on a device
    took half of the time of a test. They are copied, because jax frees them after the call.
    """
    return [np.asarray(x) for x in callback(*(np.array(x) for x in args))]


_stock_to_int = shared_memory._to_int


def to_int(x):
    """`shared_memory._to_int`, which also accepts the numpy arrays of `io_callback_impl`."""
    return x.item() if isinstance(x, np.ndarray) else _stock_to_int(x)


class OnceCompiled:
    """`thread_map._run_jaxpr`, which compiles what the threads run once for all of them."""

    def __init__(self):
        self._compiled = {}
        self._lock = threading.Lock()

    def __call__(self, jaxpr, consts, *args):
        with self._lock:
            if jaxpr not in self._compiled:
                run = functools.partial(eval_jaxpr, jaxpr)
                self._compiled[jaxpr] = jax.jit(run).lower(consts, *args).compile()
        self._compiled[jaxpr](consts, *args)


def deallocate_barrier(self: shared_memory.Barrier):
    """`Barrier.deallocate` of 0.11 without the demand that every waiter saw the last phase."""
    with self.cv:
        self.ref_count -= 1
        if self.ref_count == 0 and self.arrivals_count:
            raise ValueError(f"barrier freed with {self.arrivals_count} arrivals pending")


_once_compiled = OnceCompiled()


def unless_registers(check: Callable[..., None]) -> Callable[..., None]:
    """Check for races, except in registers, which belong to one warpgroup.

    Their keys repeat from program to program, which jax takes for conflicting accesses.
    """
    registers = shared_memory.get_memory_space_idx(core.MemorySpace.REGS)

    def checked(self, thread, clock, key, access, source_info=None):
        if key.memory_space_id != registers:
            check(self, thread, clock, key, access, source_info)

    return checked
