"""Models taken apart for decoding: the same weights, in the compute type, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.load import load_hf
from models.stacked import taken_apart, unstacked


@pytest.fixture
def model(tiny_dir):
    return load_hf(tiny_dir, dtype="bfloat16", param_dtype="float32", attn="eager")


def test_every_layer_is_its_slice_in_the_compute_type(model):
    apart = taken_apart(model)
    assert {x.dtype for x in jax.tree.leaves(apart)} == {jnp.dtype("bfloat16")}
    for i, block in enumerate(apart.blocks):
        want = jax.tree.map(lambda x, i=i: x[i].astype(jnp.bfloat16), model.blocks)
        jax.tree.map(np.testing.assert_array_equal, block, want)
    np.testing.assert_array_equal(apart.embed_VD, model.embed_VD.astype(jnp.bfloat16))
    assert model.embed_VD.dtype == jnp.float32  # the model itself is as it was


def test_it_computes_the_same(model):
    tokens = jnp.arange(8)[None]
    apart = taken_apart(model)
    apart.scan = model.scan = False  # as decoding runs: the list is not a stack to scan over
    run = jax.jit(lambda m: m(tokens))
    np.testing.assert_array_equal(run(apart), run(model))


def test_consuming_frees_the_stacks(model):
    kept = taken_apart(model)
    consumed = taken_apart(model, consume=True)
    jax.tree.map(np.testing.assert_array_equal, consumed, kept)
    assert all(x.is_deleted() for x in jax.tree.leaves(model.blocks))
    assert not model.embed_VD.get_value().is_deleted()


def test_the_gradient_of_slices_is_a_stack():
    """Of all L slices at once, as that of the stack."""
    x = jnp.arange(6.0).reshape(3, 2)

    def f(x):
        a, b, c = unstacked({"w": x}, 3)
        return (a["w"] * 2 + c["w"] ** 2 + 0 * b["w"]).sum()

    np.testing.assert_array_equal(jax.grad(f)(x), [[2, 2], [0, 0], [8, 10]])
