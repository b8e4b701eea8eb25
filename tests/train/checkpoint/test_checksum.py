"""Checksums: the same on any mesh, another for any changed bit of arrays or metadata."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.checkpoint.checksum import _checksum, read_metadata, with_digest


def _arrays():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.standard_normal((16, 8)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((16, 8)), jnp.float32),
        "c": jnp.asarray(rng.standard_normal(40), jnp.bfloat16),
        "d": jnp.int8([-3, 5]),
        "e": jnp.int32(7),
    }


def test_one_flipped_bit_shows_in_every_type():
    state = _arrays()
    whole = int(_checksum(state))
    for name, x in state.items():
        raw = np.asarray(x).copy()
        raw.reshape(-1).view(np.uint8)[0] ^= 1
        assert int(_checksum(state | {name: jnp.asarray(raw)})) != whole, name


def test_exchanged_arrays_show():
    state = _arrays()
    swapped = state | {"a": state["b"], "b": state["a"]}
    assert int(_checksum(swapped)) != int(_checksum(state))


def test_the_same_on_any_mesh():
    state = _arrays()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("x"))
    sharded = state | {name: jax.device_put(state[name], split) for name in ("a", "b", "c")}
    assert int(_checksum(sharded)) == int(_checksum(state))


METADATA = {"data": {"row": 80, "epoch": 1}, "identity": {"seed": 0}, "loss": 2.5, "config": None}


def _write(tmp_path, content: bytes):
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metadata").write_bytes(content)


def test_metadata_come_back_as_json_values(tmp_path):
    """Tuples become lists and integer keys strings; numbers that are no JSON stay readable."""
    _write(tmp_path, json.dumps(with_digest({"a": (1, 2), 10: "x", 9: float("nan")})).encode())
    found = read_metadata(tmp_path)
    assert found["a"] == [1, 2] and found["10"] == "x" and np.isnan(found["9"])


def test_a_flipped_bit_in_any_byte_of_metadata_is_found(tmp_path):
    """A flip is found, or changes no value (one kind of white space into another)."""
    raw = json.dumps(with_digest(METADATA)).encode()
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << position % 8
        _write(tmp_path, bytes(damaged))
        with contextlib.suppress(ValueError):
            assert read_metadata(tmp_path) == METADATA, damaged


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe"],
)
def test_metadata_of_another_shape_are_damaged(tmp_path, content):
    _write(tmp_path, content)
    with pytest.raises(ValueError):
        read_metadata(tmp_path)
