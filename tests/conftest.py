"""Every test runs strict: 8 fake CPU devices, no silent dtype or rank promotion."""

import gc
import importlib.util
import os
import pathlib
import shutil
import tempfile

# Before jax is imported: without a GPU the tests see 8 devices, so that sharding is real.
# (On a GPU machine `pytest -m gpu` wants the GPU: leave the platform to jax there.)
# The user's own flags stay, and come last: the last counts.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)

# Tests compile much and compute little. Without XLA's optimizations a training step compiles in two
# thirds of the time, and random weights in a fifth. Programs are the same up to XLA's last step,
# which makes machine code. Child processes inherit the variable; a value of 0 turns it off.
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest

# Tracing and compiling make so many objects that Python looked for cycles 20 times a second, in a
# heap with all of jax, flax and torch: 7% of the CPU time of the tests, now 2%.
gc.set_threshold(100_000, 20, 20)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def compile_quickly():
    """For modules that compile much and compute little, on a machine with a GPU, too."""
    yield from _optimizations(False)


@pytest.fixture
def compile_fully():
    """For tests that compute much, or whose numbers are those of a user's run."""
    yield from _optimizations(True)


def _optimizations(on: bool):
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not on)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_configure(config: pytest.Config) -> None:
    """Lets what one test, worker or program compiles be read by all others of the session.

    The directory begins empty, so that nothing of an earlier session counts, and is removed.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or shutil.which("nvidia-smi"):
        return  # one of the xdist workers, which inherit it, or the user's own; or a GPU
    compiled = tempfile.mkdtemp(prefix="internlm2-jax-tests-")
    config.add_cleanup(lambda: shutil.rmtree(compiled, ignore_errors=True))
    # Seconds of compiling that are worth a file. Small programs are worth one, too: compiling takes
    # 20 ms, reading 5 ms, and most tests have dozens of programs that another test has had.
    least = 0.0
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(least)
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, and says why."""
    gpus = [d for d in jax.devices() if d.platform == "gpu"]
    hopper = bool(gpus) and str(getattr(gpus[0], "compute_capability", "")) == "9.0"
    asked = items and "slow" in (items[0].config.option.markexpr or "")
    for item in items:
        if item.get_closest_marker("slow") and not asked:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with: pytest -m slow"))
        if item.get_closest_marker("gpu") and not hopper:
            item.add_marker(pytest.mark.skip(reason="needs a Hopper GPU (compute capability 9.0)"))
        if item.get_closest_marker("multigpu") and len(gpus) < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs 2 GPUs, this machine has {len(gpus)}"))
        # Asked for by name they run, and fail if they cannot: CI must not pass by skipping them.
        if item.get_closest_marker("codegen") and item.config.getoption("-m") != "codegen":
            if not _has_gpu_compiler():
                reason = "needs the codegen extra (run with: make codegen)"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Exclude what is there before a module from Python's garbage collector.

    Each use of a checkpoint ends with a full collection (models/weights/orbax_errors.py). With all
    objects of jax, flax, torch and the tests in the heap it took 0.7 s, a seventh of the CPU time
    of the tests of train/run. Garbage is collected first, so none is kept.
    """
    gc.collect()
    gc.freeze()


def _has_gpu_compiler() -> bool:
    """Return True if jax's CUDA plugin, ptxas and nvdisasm are installed; no GPU is needed."""
    if not all(map(importlib.util.find_spec, ("jax_plugins", "jax_cuda13_plugin", "nvidia"))):
        return False
    nvidia = importlib.util.find_spec("nvidia").submodule_search_locations
    return any(pathlib.Path(path, "cu13", "bin", "nvdisasm").exists() for path in nvidia)
