"""The devices as a mesh of data x fsdp x tensor.

One device is the mesh 1 x 1 x 1, and runs the same code. What each array does with the axes stands
in `models.sharding`; the mesh is in explicit mode, so a mistake there is an error when the step is
traced, not a slow program.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from train.config.sections import MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lays the devices out.

    Args:
        config: the sizes; an fsdp of None takes every device that data and tensor leave.
        devices: by default all of this run's.

    Returns:
        A mesh with explicit axes "data", "fsdp", "tensor".

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.data * config.tensor
    fsdp = config.fsdp if config.fsdp is not None else max(1, len(devices) // fixed)
    if fixed * fsdp != len(devices):
        raise ValueError(
            f"--mesh.data={config.data} x --mesh.fsdp={fsdp} x --mesh.tensor={config.tensor} = "
            f"{fixed * fsdp} must be the number of devices, {len(devices)}"
        )
    return jax.make_mesh(
        (config.data, fsdp, config.tensor),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Explicit,) * 3,
        devices=devices,
    )


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """In how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))


def check_rows(mesh: Mesh | AbstractMesh, *, rows: int, grad_accum: int) -> None:
    """Checks that a step's rows divide over microbatches and devices.

    Args:
        mesh: the devices.
        rows: of a step.
        grad_accum: its microbatches.

    Raises:
        ValueError: naming the flags and the numbers that would do.
    """
    shards = row_shards(mesh)
    if rows % (grad_accum * shards):
        raise ValueError(
            f"--batch_size={rows} must be a multiple of {grad_accum * shards}: "
            f"--grad_accum={grad_accum} parts, "
            f"each split over {shards} devices (mesh.data x mesh.fsdp)"
        )
