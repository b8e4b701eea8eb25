"""Lay the devices out as a mesh of data x fsdp x tensor.

One device is the mesh 1 x 1 x 1 and runs the same code. `models.sharding` maps the axes of arrays
to those of the mesh. The mesh is in explicit mode, so a wrong sharding is an error when the step is
traced, not a slow program.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from train.config.sections import MeshConfig

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of the devices, with explicit axes "data", "fsdp", "tensor".

    Args:
        config: Sizes of the axes; an fsdp of None takes all devices that data and tensor leave.
        devices: None: all devices of the run.

    Raises:
        ValueError: The sizes do not multiply to the number of devices.
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
        AXES,
        axis_types=(AxisType.Explicit,) * 3,
        devices=devices,
    )


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Return the mesh of devices that are not in this machine; an fsdp of None is 1."""
    return AbstractMesh((config.data, config.fsdp or 1, config.tensor), AXES)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))


def check_rows(mesh: Mesh | AbstractMesh, *, rows: int, grad_accum: int) -> None:
    """Check that the rows of a step divide over microbatches and devices.

    Args:
        mesh: Devices.
        rows: Rows of a step.
        grad_accum: Microbatches of a step.

    Raises:
        ValueError: They do not; names the flags and a number that does.
    """
    shards = row_shards(mesh)
    if rows % (grad_accum * shards):
        raise ValueError(
            f"--batch_size={rows} must be a multiple of {grad_accum * shards}: "
            f"--grad_accum={grad_accum} times {shards} devices that split rows "
            "(--mesh.data x --mesh.fsdp)"
        )
