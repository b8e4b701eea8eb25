"""The mesh has every device, or the error names the flags."""

import jax
import pytest
from jax.sharding import AxisType

from train.config.sections import MeshConfig
from train.distributed.mesh import check_rows, make_mesh, row_shards


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=2), (2, 4, 1)),
        (MeshConfig(tensor=4), (1, 2, 4)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_fsdp_takes_what_is_left(config, sizes):
    mesh = make_mesh(config)
    assert mesh.devices.shape == sizes
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert row_shards(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(fsdp=4), MeshConfig(tensor=16)])
def test_sizes_must_multiply_to_the_devices(config):
    with pytest.raises(ValueError, match="must be the number of devices, 8"):
        make_mesh(config)


def test_one_device_is_a_mesh():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


def test_rows_must_divide():
    mesh = make_mesh(MeshConfig(tensor=2))
    check_rows(mesh, rows=8, grad_accum=2)
    with pytest.raises(ValueError, match="--batch_size=12 must be a multiple of 8: --grad_accum=2"):
        check_rows(mesh, rows=12, grad_accum=2)
