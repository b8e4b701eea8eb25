"""The attention interface: choice of implementation, argument checks, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxattn import Mask, attention


def _qkv(b=2, t=16, s=16, n=4, k=2, h=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(b, t, n, h)), dtype)
    kk, v = (jnp.asarray(rng.normal(size=(b, s, k, h)), dtype) for _ in range(2))
    return q, kk, v


@pytest.mark.parametrize("impl", ["eager", "xla"])
@pytest.mark.parametrize("spec", [("d", None), ("d", "m"), (None, "m")])
def test_sharded_equals_unsharded(impl, spec):
    """Batch and heads split over 8 devices: same output, same gradients."""
    q, k, v = _qkv(b=4, n=8, k=4)
    ids = jnp.asarray(np.repeat([[1, 1, 2, 2, 2, 3, 3, 0]], 4, 0).repeat(2, 1), jnp.int32)
    mask = Mask(segment_ids=ids)

    def loss(q, k, v, mask):
        out = attention(q, k, v, mask, impl=impl)
        return (out * out).sum()

    want = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v, mask)
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        bnh = NamedSharding(mesh, PartitionSpec(spec[0], None, spec[1], None))
        rows = NamedSharding(mesh, PartitionSpec(spec[0], None))
        args = [jax.device_put(x, bnh) for x in (q, k, v)]
        sharded_mask = Mask(segment_ids=jax.device_put(ids, rows))
        got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args, sharded_mask)
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=1e-5, atol=1e-5)
