"""Hardware facts: default device, memory, peak FLOP/s and memory bandwidth.

The other packages read these facts from here; no other module has a table of GPUs.
"""

import dataclasses
import types
from collections.abc import Mapping
from pathlib import Path

import jax
import psutil

GiB = 1 << 30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """Describe a GPU model; has the attributes of `jax.Device` that jaxattn and train read.

    A `DeviceSpec` takes the place of a `jax.Device` where no such GPU is installed.

    Attributes:
      device_kind: name of the GPU as in `jax.Device.device_kind`.
      memory: total memory in GiB, as nvidia-smi reports it.
      compute_capability: CUDA compute capability, "9.0" for Hopper.
      peak_flops: dense bf16 tensor-core FLOP/s with fp32 accumulation; None: unknown.
      bandwidth: memory bandwidth in bytes/s; None: unknown.
      host_memory: assumed main memory in GiB for each GPU of the machine.
      memory_fraction: fraction of the memory that jax allocates
        (XLA_PYTHON_CLIENT_MEM_FRACTION); jax's default.
    """

    device_kind: str
    memory: float
    compute_capability: str
    peak_flops: float | None = None
    bandwidth: float | None = None
    host_memory: float = 128.0
    memory_fraction: float = 0.75
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int]:
        """Return the memory limit in bytes, under the key of `jax.Device.memory_stats`."""
        return {"bytes_limit": int(self.memory * self.memory_fraction * GiB)}


# Memory: the total of nvidia-smi. Peak: NVIDIA's figures with sparsity, halved. Sources:
# H200, H100 SXM, A100 SXM and L40S datasheets; NVIDIA Ada GPU architecture (RTX 4090), appendix A;
# NVIDIA Ampere GA102 GPU architecture (RTX 3090), table 9; NVIDIA RTX Blackwell GPU architecture
# (RTX 5090), appendix A. The peaks of GeForce GPUs are those with fp32 accumulation.
GPUS: Mapping[str, DeviceSpec] = types.MappingProxyType(
    {
        "h200": DeviceSpec("NVIDIA H200", 143_771 / 1024, "9.0", 989e12, 4.8e12),
        "h100": DeviceSpec("NVIDIA H100 80GB HBM3", 81_559 / 1024, "9.0", 989e12, 3.35e12),
        "a100-80": DeviceSpec("NVIDIA A100-SXM4-80GB", 81_920 / 1024, "8.0", 312e12, 2.039e12),
        "a100-40": DeviceSpec("NVIDIA A100-SXM4-40GB", 40_960 / 1024, "8.0", 312e12, 1.555e12),
        "l40s": DeviceSpec("NVIDIA L40S", 46_068 / 1024, "8.9", 362e12, 864e9),
        "rtx4090": DeviceSpec("NVIDIA GeForce RTX 4090", 24_564 / 1024, "8.9", 165.2e12, 1008e9),
        "rtx3090": DeviceSpec("NVIDIA GeForce RTX 3090", 24_576 / 1024, "8.6", 71e12, 936e9),
        "rtx5090": DeviceSpec("NVIDIA GeForce RTX 5090", 32_607 / 1024, "12.0", 209.5e12, 1792e9),
    }
)
"""GPU models by short name."""


def default_device() -> jax.Device:
    """Return the device that traced code runs on and new arrays go to.

    `jax_default_device` may be unset, a `jax.Device` or the name of a platform ("cpu").
    """
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default if isinstance(default, jax.Device) else jax.local_devices()[0]


def device_memory(device: jax.Device | DeviceSpec) -> int:
    """Return the bytes that jax may allocate on a device; for a CPU, the machine's memory."""
    stats = device.memory_stats() if device.platform == "gpu" else None
    return stats["bytes_limit"] if stats and "bytes_limit" in stats else host_memory()


def host_memory() -> int:
    """Return the main memory in bytes that this process may use: the machine's or its cgroup's."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no cgroup (version 2), or "max"
        return total


def peak_flops(device: jax.Device | DeviceSpec | str) -> float | None:
    """Return the peak of a device (or `device_kind`) in dense bf16 FLOP/s; None: not in `GPUS`."""
    spec = _spec(device)
    return spec and spec.peak_flops


def memory_bandwidth(device: jax.Device | DeviceSpec | str) -> float | None:
    """Return the memory bandwidth of a device (or `device_kind`), bytes/s; None: not in `GPUS`."""
    spec = _spec(device)
    return spec and spec.bandwidth


def _spec(device: jax.Device | DeviceSpec | str) -> DeviceSpec | None:
    if isinstance(device, DeviceSpec):
        return device
    kind = device if isinstance(device, str) else device.device_kind
    return next((spec for spec in GPUS.values() if spec.device_kind == kind), None)
