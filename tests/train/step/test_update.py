"""An update layer by layer gives the same bits as one of whole arrays, in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models.execution import Execution
from models.internlm2 import InternLM2
from train.config.sections import MeshConfig, OptimConfig
from train.distributed.mesh import make_mesh
from train.step.optim import optimizer
from train.step.state import abstract_state, new_state, params_of
from train.step.update import by_layer, update_weights

INT8 = OptimConfig(moment_dtype="int8", clip=0.5)


def some_gradients(params, seed):
    """Draw normal numbers of several sizes, in the dtype of the weights."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [
            (0.1 * (i % 3 + 1) * jax.random.normal(k, p.shape)).astype(p.dtype)
            for i, (k, p) in enumerate(zip(keys, leaves, strict=True))
        ]
    )


def training(config, model, mesh):
    """Return the optimizer and the first state of a model on a mesh."""
    tx = optimizer(config, 1e-2, 10, param_dtype=jnp.bfloat16)

    def make():
        kwargs = {"attn": "xla", "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        return InternLM2(model, rngs=nnx.Rngs(0), execution=Execution(**kwargs))

    _, like = abstract_state(make, tx, mesh)
    return tx, new_state(params_of(nnx.jit(make)(), like), tx, like), like


def compiled(tx, like, layered):
    """Compile an update of donated weights and moments."""

    def update(params, opt_state, grads, good):
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        return update_weights(tx, grads, params, opt_state, norm=norm, good=good, layered=layered)

    with jax.set_mesh(like.mesh):
        good = jax.ShapeDtypeStruct((), jnp.bool)
        jitted = jax.jit(update, donate_argnums=(0, 1))
        return jitted.lower(like.params, like.opt_state, like.params, good).compile()


def test_layer_by_layer_gives_the_same_numbers(tiny):
    """Three updates on 2 x 2 x 2 devices; the second is skipped, the third has a broken gradient.

    Random bits, clipping, weight decay and the count of weights that kept their values are the
    same. An element that is rounded at random may fall on the other side: XLA orders the operations
    of the two programs differently.
    """
    mesh = make_mesh(MeshConfig(fsdp=2, seq=2, tensor=2))
    results = {}
    for layered in (False, True):
        tx, state, like = training(INT8, tiny, mesh)
        step = compiled(tx, like, layered)
        params, opt_state, kept = state.params, state.opt_state, []
        for number in range(3):
            grads = some_gradients(like.params, number)
            if number == 2:
                blocks = grads["blocks"]
                name = sorted(blocks)[0]
                first, tree = jax.tree.flatten(blocks[name])
                first[0] = first[0].at[(1, *[0] * (first[0].ndim - 1))].set(jnp.inf)
                blocks[name] = tree.unflatten(first)
            grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, like.params)
            params, opt_state, more = step(params, opt_state, grads, jnp.asarray(number != 1))
            kept.append(float(more))
        results[layered] = jax.device_get((params, opt_state)), kept
        assert jax.tree.map(lambda a: a.sharding, params) == jax.tree.map(
            lambda a: a.sharding, like.params
        )
    for one, other in zip(
        *(jax.tree.leaves(results[way][0]) for way in (True, False)), strict=True
    ):
        differ = np.asarray(one, np.float32) != np.asarray(other, np.float32)
        assert differ.mean() < 1e-3
    assert results[True][1] == results[False][1] == [0, 0, 1]


def test_layer_by_layer_needs_the_memory_of_a_layer(tiny):
    """The compiler's count of temporary bytes, for 16 layers of a wider model on one device."""
    model = dataclasses.replace(tiny, num_layers=16, hidden_size=128, intermediate_size=512)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    tx, _, like = training(INT8, model, mesh)
    whole, layered = (
        compiled(tx, like, layered).memory_analysis().temp_size_in_bytes
        for layered in (False, True)
    )
    assert layered < whole / 3


def test_only_int8_moments_of_a_scan_are_updated_layer_by_layer():
    assert by_layer(INT8, scan=True, lora=False)
    assert not by_layer(INT8, scan=False, lora=False)
    assert not by_layer(INT8, scan=True, lora=True)
    assert not by_layer(OptimConfig(moment_dtype="bf16"), scan=True, lora=False)
    assert not by_layer(OptimConfig(name="adafactor"), scan=True, lora=False)
