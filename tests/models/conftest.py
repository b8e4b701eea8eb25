"""Fixtures of the tests of models: the golden checkpoint and meshes."""

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """HF directory of the golden checkpoint; tests/data/internlm2_tiny/README.md describes it."""
    return DATA / "internlm2_tiny"


@pytest.fixture(scope="session")
def golden(tiny_dir) -> dict[str, np.ndarray]:
    """Load the outputs of the original PyTorch model."""
    with np.load(tiny_dir / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def make_mesh():
    """Return a function (data, fsdp, tensor, seq) -> explicit mesh over the fake devices."""

    def make(data: int, fsdp: int, tensor: int, seq: int = 1) -> jax.sharding.Mesh:
        devices = jax.devices()[: data * fsdp * seq * tensor]
        axes, sizes = ("data", "fsdp", "seq", "tensor"), (data, fsdp, seq, tensor)
        types = (AxisType.Explicit,) * 4
        return jax.make_mesh(sizes, axes, axis_types=types, devices=devices)

    return make


@pytest.fixture(scope="module")
def one_torch_thread():
    """Models this small are slower on more threads, which also take the cores of other tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact():
    """Highest matmul precision: what the fp32 tolerances of the goldens presume."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly):
    """All of the tests here compile much and compute little."""
