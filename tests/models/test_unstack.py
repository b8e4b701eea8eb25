"""Models taken apart for decoding: the same weights, in the compute type, layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.execution import Execution
from models.unstack import unstack_layers
from models.weights.load import load_hf
from models.xla_workarounds import grad_barrier, unstack


@pytest.fixture
def model(tiny_dir):
    return load_hf(
        tiny_dir, execution=Execution(dtype="bfloat16", param_dtype="float32", attn="eager")
    )


def test_every_layer_is_its_slice_in_the_compute_type(model):
    apart = unstack_layers(model)
    assert {x.dtype for x in jax.tree.leaves(apart)} == {jnp.dtype("bfloat16")}
    for i, block in enumerate(apart.blocks):
        want = jax.tree.map(lambda x, i=i: x[i].astype(jnp.bfloat16), model.blocks)
        jax.tree.map(np.testing.assert_array_equal, block, want)
    np.testing.assert_array_equal(apart.embed_VD, model.embed_VD.astype(jnp.bfloat16))
    assert model.embed_VD.dtype == jnp.float32  # the model itself is as it was


def test_it_computes_the_same(model):
    tokens = jnp.arange(8)[None]
    apart = unstack_layers(model)
    apart.execution = model.execution = dataclasses.replace(model.execution, scan=False)
    # as decoding runs: the list is not a stack to scan over
    run = jax.jit(lambda m: m(tokens))
    np.testing.assert_array_equal(run(apart), run(model))


def test_consuming_frees_the_stacks(model):
    kept = unstack_layers(model)
    consumed = unstack_layers(model, consume=True)
    jax.tree.map(np.testing.assert_array_equal, consumed, kept)
    assert all(x.is_deleted() for x in jax.tree.leaves(model.blocks))
    assert not model.embed_VD.get_value().is_deleted()


def test_the_gradient_of_slices_is_a_stack():
    """Of all L slices at once, as that of the stack."""
    x = jnp.arange(6.0).reshape(3, 2)

    def f(x):
        a, b, c = unstack({"w": x}, 3)
        return (a["w"] * 2 + c["w"] ** 2 + 0 * b["w"]).sum()

    np.testing.assert_array_equal(jax.grad(f)(x), [[2, 2], [0, 0], [8, 10]])


def test_gradients_are_formed_together_and_are_the_same():
    """A barrier in the backward pass, none in the forward one, and no number changed."""

    def together(x, w):
        x, weights = grad_barrier(x, {"w": w})
        return jnp.sin(x * weights["w"]).sum()

    def plain(x, w):
        return jnp.sin(x * w).sum()

    args = jnp.arange(3.0), jnp.arange(3.0) + 2
    got, want = (jax.grad(f, argnums=(0, 1))(*args) for f in (together, plain))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert "optimization_barrier" not in str(jax.make_jaxpr(together)(*args))
    assert str(jax.make_jaxpr(jax.grad(together))(*args)).count("optimization_barrier") == 1


def test_every_layer_forms_its_grad_barrier(model):
    """Of layers that are compiled one by one: otherwise XLA delays the gradients of weights."""
    model.execution = dataclasses.replace(model.execution, scan=False)
    tokens = jnp.arange(8)[None]
    program = jax.make_jaxpr(jax.grad(lambda m: m.hidden(tokens).astype(jnp.float32).sum()))
    of_blocks = [e for e in program(model).eqns if e.primitive.name == "optimization_barrier"]
    leaves = len(jax.tree.leaves(model.blocks))
    both = [e for e in of_blocks if len(e.invars) == leaves + 1]
    assert len(both) == model.config.num_layers
