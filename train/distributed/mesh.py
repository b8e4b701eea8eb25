"""Lay the devices out as a mesh of data x fsdp x seq x tensor.

One device is the mesh 1 x 1 x 1 x 1 and runs the same code. `models.sharding` maps the axes of
arrays to those of the mesh. The mesh is in explicit mode, so a wrong sharding is an error when the
step is traced, not a slow program.
"""

import math
from collections.abc import Sequence
from itertools import product

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from train.config.sections import MeshConfig

AXES = ("data", "fsdp", "seq", "tensor")
MOST_SHOWN = 6  # meshes that an error lists


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of the devices, with explicit axes `AXES`; by default of all of the run.

    An fsdp of None takes all devices that the other axes leave.

    Raises:
        ValueError: The sizes do not multiply to the number of devices; lists meshes that do.
    """
    devices = jax.devices() if devices is None else devices
    fixed = config.data * config.seq * config.tensor
    fsdp = config.fsdp if config.fsdp is not None else max(1, len(devices) // fixed)
    if fixed * fsdp != len(devices):
        raise ValueError(
            f"--mesh.data={config.data} x --mesh.fsdp={fsdp} x --mesh.seq={config.seq} x "
            f"--mesh.tensor={config.tensor} = {fixed * fsdp} must be the number of devices, "
            f"{len(devices)}: take {', or '.join(_meshes(config, len(devices)))}"
        )
    return jax.make_mesh(
        (config.data, fsdp, config.seq, config.tensor),
        AXES,
        axis_types=(AxisType.Explicit,) * len(AXES),
        devices=devices,
    )


def _meshes(config: MeshConfig, count: int) -> list[str]:
    """Return the flags of the meshes of `count` devices that change the fewest of the given sizes.

    An fsdp that is not given is free. A size of 1 is the default and is left out.
    """
    given = (config.data, config.fsdp, config.seq, config.tensor)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    meshes = [sizes for sizes in product(divisors, repeat=len(AXES)) if math.prod(sizes) == count]
    changes = [
        sum(old not in (None, new) for old, new in zip(given, sizes, strict=True))
        for sizes in meshes
    ]
    nearest = [sizes for sizes, n in zip(meshes, changes, strict=True) if n == min(changes)]
    nearest.sort(key=lambda sizes: -sizes[AXES.index("fsdp")])
    return [
        " ".join(
            f"--mesh.{axis}={size}"
            for axis, size in zip(AXES, sizes, strict=True)
            if size > 1 or axis == "fsdp"
        )
        for sizes in nearest[:MOST_SHOWN]
    ]


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Return the mesh of devices that are not in this machine; an fsdp of None is 1."""
    return AbstractMesh((config.data, config.fsdp or 1, config.seq, config.tensor), AXES)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))


def head_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of devices that share the attention heads of a row."""
    return mesh.shape["seq"] * mesh.shape["tensor"]


def check_rows(mesh: Mesh | AbstractMesh, *, rows: int, grad_accum: int) -> None:
    """Raise ValueError unless the rows of a step divide over microbatches and devices."""
    shards = row_shards(mesh)
    if rows % (grad_accum * shards):
        raise ValueError(
            f"--batch_size={rows} must be a multiple of {grad_accum * shards}: "
            f"--grad_accum={grad_accum} times {shards} devices that split rows "
            "(--mesh.data x --mesh.fsdp)"
        )


def check_seq(mesh: Mesh | AbstractMesh, *, heads: int, seq_len: int) -> None:
    """Raise ValueError unless seq divides the tokens of a row, and with tensor the query heads."""
    seq, tensor = mesh.shape["seq"], mesh.shape["tensor"]
    left = heads // tensor
    right = [n for n in range(1, left + 1) if left % n == 0 and seq_len % n == 0]
    if seq > 1 and heads % tensor == 0 and seq not in right:
        over = f" ({heads} over --mesh.tensor={tensor})" if tensor > 1 else ""
        raise ValueError(
            f"--mesh.seq={seq} must divide {left} query heads{over}, for which attention exchanges "
            f"tokens, and --seq_len={seq_len}: take {' or '.join(map(str, right))}"
        )
