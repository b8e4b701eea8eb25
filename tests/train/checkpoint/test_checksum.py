"""The checksum of a state: the same on any mesh, another for any changed bit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.checkpoint.checksum import _checksum


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
