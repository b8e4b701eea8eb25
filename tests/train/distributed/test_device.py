"""Compiler options, and that they reach the programs of a run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from train.distributed.device import compiler_options
from train.run import build, loop

OPTIONS = {"xla_gpu_deterministic_ops": True}


def test_nothing_unless_asked():
    assert compiler_options(deterministic=False) is None


def test_fp8_leaves_products_to_cublas():
    """The option reaches the compiler, beside that of a deterministic run."""
    option = {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options(deterministic=False, matmul="fp8") == option
    assert compiler_options(deterministic=True, matmul="fp8") == OPTIONS | option
    assert jax.jit(lambda x: 2 * x, compiler_options=option)(jnp.float32(2)) == 4


def test_values_in_host_memory_are_no_reason_to_recompute():
    option = {"xla_gpu_memory_limit_slop_factor": 1000}
    assert compiler_options(deterministic=False, remat="full,offload_input") == option
    assert jax.jit(lambda x: 2 * x, compiler_options=option)(jnp.float32(2)) == 4


def test_the_compiler_knows_the_option():
    """A name that XLA does not know is an error, on a CPU too."""
    assert compiler_options(deterministic=True) == OPTIONS
    assert jax.jit(lambda x: 2 * x, compiler_options=OPTIONS)(jnp.float32(2)) == 4
    with pytest.raises(Exception, match="xla_gpu_determinism"):
        jax.jit(lambda x: x, compiler_options={"xla_gpu_determinism": True})(jnp.float32(2))


class Asked(Exception):
    """Ends a run where the compiler is asked."""


@pytest.mark.parametrize("program", ["step", "evaluation"])
def test_a_deterministic_run_asks_for_it(program, tiny_run, tmp_path, monkeypatch):
    def stop_at_step(step, like, batch, options):
        raise Asked(options)

    def stop_at_evaluation(*_, options, **__):
        raise Asked(options)

    if program == "step":
        monkeypatch.setattr(build, "compile_step", stop_at_step)
    else:
        monkeypatch.setattr(loop, "compile_training", lambda *_: None)
        monkeypatch.setattr(loop, "Evaluation", stop_at_evaluation)
    config = dataclasses.replace(tiny_run(tmp_path / "out"), deterministic=True)
    with pytest.raises(Asked) as asked:
        loop.run(config)
    assert asked.value.args == (OPTIONS,)
