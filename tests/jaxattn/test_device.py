"""Hardware facts: the default device, memory, peaks and bandwidths."""

from unittest import mock

import jax
import jax.numpy as jnp
import psutil
import pytest

from jaxattn.device import (
    GPUS,
    DeviceSpec,
    default_device,
    device_memory,
    host_memory,
    memory_bandwidth,
    peak_flops,
)


def test_default_device_is_where_new_arrays_go():
    """Unset, as a device, and as the name of a platform."""
    assert default_device() == jnp.zeros(1).device
    with jax.default_device(jax.devices()[3]):
        assert default_device() == jax.devices()[3] == jnp.zeros(1).device


def test_default_device_by_platform_name(monkeypatch):
    """The name of a platform wins over the machine's first device."""
    cpus = jax.local_devices(backend="cpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: cpus if backend else cpus[3:])
    assert default_device() is cpus[3]
    with jax.default_device("cpu"):
        assert default_device() is cpus[0]


@pytest.mark.parametrize("limit", ["max", "4096", None])
def test_cpu_memory_is_the_machines_or_the_cgroups(limit, monkeypatch, tmp_path):
    file = tmp_path / "memory.max"
    if limit is not None:
        file.write_text(limit + "\n")
    monkeypatch.setattr("jaxattn.device.CGROUP_LIMIT", file)
    expected = 4096 if limit == "4096" else psutil.virtual_memory().total
    assert device_memory(jax.devices("cpu")[0]) == host_memory() == expected


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 1}])
def test_gpu_without_a_limit_has_the_machines_memory(stats):
    gpu = mock.Mock(spec=jax.Device, platform="gpu", memory_stats=lambda: stats)
    assert device_memory(gpu) == host_memory()


def test_memory_of_a_spec_is_the_fraction_that_jax_allocates():
    assert device_memory(DeviceSpec("a GPU", 80.0, "9.0")) == 60 << 30
    assert device_memory(DeviceSpec("a GPU", 80.0, "9.0", memory_fraction=0.5)) == 40 << 30


def test_peaks_and_bandwidths():
    """By device, by name, and None for a device that the table lacks."""
    h100 = GPUS["h100"]
    assert peak_flops(h100) == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert memory_bandwidth(h100) == memory_bandwidth("NVIDIA H100 80GB HBM3") == 3.35e12
    cpu = jax.devices("cpu")[0]
    assert peak_flops(cpu) is memory_bandwidth(cpu) is peak_flops("NVIDIA H999") is None
    assert peak_flops(DeviceSpec("80 GiB", 80.0, "9.0")) is None


def test_the_table_is_complete_and_cannot_be_changed():
    kinds = [spec.device_kind for spec in GPUS.values()]
    assert len(set(kinds)) == len(kinds) == 8
    assert all(
        spec.peak_flops and spec.bandwidth and spec.platform == "gpu" for spec in GPUS.values()
    )
    with pytest.raises(TypeError):
        GPUS["h200"] = GPUS["h100"]
