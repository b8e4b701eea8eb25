"""The mesh has every device, or the error names the flags."""

import re

import jax
import pytest
from jax.sharding import AxisType

from train.config.sections import MeshConfig
from train.distributed.mesh import (
    MOST_SHOWN,
    abstract_mesh,
    check_rows,
    check_seq,
    make_mesh,
    row_shards,
)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=2), (2, 4, 1, 1)),
        (MeshConfig(tensor=4), (1, 2, 1, 4)),
        (MeshConfig(seq=4), (1, 2, 4, 1)),
        (MeshConfig(fsdp=2, seq=2, tensor=2), (1, 2, 2, 2)),
    ],
)
def test_fsdp_takes_what_is_left(config, sizes):
    mesh = make_mesh(config)
    assert mesh.devices.shape == sizes
    assert mesh.axis_names == ("data", "fsdp", "seq", "tensor")
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert row_shards(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize(
    ("sizes", "remedies"),
    [
        ({"data": 3}, [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "fsdp": 2}]),
        ({"fsdp": 4}, [{"fsdp": 8}, {"fsdp": 4, "seq": 2}]),
        ({"seq": 3, "fsdp": 4}, [{"fsdp": 4, "seq": 2}]),
        ({"tensor": 16, "seq": 2}, [{"fsdp": 4, "seq": 2}, {"fsdp": 2, "seq": 2, "tensor": 2}]),
    ],
)
def test_sizes_must_multiply_to_the_devices(sizes, remedies):
    """The meshes that the message lists work; those that keep more of the given sizes."""
    with pytest.raises(ValueError, match=r"must be the number of devices, 8: take ") as error:
        make_mesh(MeshConfig(**sizes))
    listed = [
        {axis: int(n) for axis, n in re.findall(r"--mesh\.(\w+)=(\d+)", mesh)}
        for mesh in str(error.value).partition(": take ")[2].split(", or ")
    ]
    assert len(listed) <= MOST_SHOWN and all(mesh in listed for mesh in remedies)
    assert all(make_mesh(MeshConfig(**mesh)).size == 8 for mesh in listed)


def test_one_device_is_a_mesh():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


def test_rows_must_divide():
    mesh = make_mesh(MeshConfig(tensor=2))
    check_rows(mesh, rows=8, grad_accum=2)
    with pytest.raises(ValueError, match="--batch_size=12 must be a multiple of 8: --grad_accum=2"):
        check_rows(mesh, rows=12, grad_accum=2)


@pytest.mark.parametrize(
    ("seq", "tensor", "seq_len", "message"),
    [
        (3, 1, 96, "--mesh.seq=3 must divide 16 query heads, .*: take 1 or 2 or 4 or 8 or 16$"),
        (8, 1, 100, "--mesh.seq=8 must divide .* and --seq_len=100: take 1 or 2 or 4$"),
        (32, 1, 96, "--mesh.seq=32 must divide 16 query heads, "),
        (4, 8, 64, r"=4 must divide 2 query heads \(16 over --mesh.tensor=8\), .* 1 or 2$"),
    ],
)
def test_seq_must_divide_heads_and_tokens(seq, tensor, seq_len, message):
    """And what does is listed, more than there are kv heads included."""
    mesh = abstract_mesh(MeshConfig(seq=seq, tensor=tensor))
    with pytest.raises(ValueError, match=message):
        check_seq(mesh, heads=16, seq_len=seq_len)
    check_seq(abstract_mesh(MeshConfig(seq=2, tensor=tensor)), heads=16, seq_len=seq_len)
