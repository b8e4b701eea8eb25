"""The state is float32, sharded, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.internlm2 import InternLM2
from train.config.sections import MeshConfig, OptimConfig
from train.distributed.mesh import make_mesh
from train.step.optim import optimizer
from train.step.state import _initial, abstract_state, new_state, params_of


@pytest.fixture
def tx():
    return optimizer(OptimConfig(), 1e-3, 10)


def state_on(model, tx, mesh):
    _, like = abstract_state(lambda: InternLM2(model.config, rngs=nnx.Rngs(0)), tx, mesh)
    copy = jax.tree.map(jnp.array, model)  # new_state consumes what it is given
    return like, new_state(params_of(copy, like), tx, like)


def test_is_what_was_announced(tiny_model, tx):
    """Shape, dtype and sharding of every array, so that a restored state fits the compiled step."""
    like, state = state_on(tiny_model, tx, make_mesh(MeshConfig(tensor=2)))
    described = jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), state)
    assert described == jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), like)
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert int(state.step) == 0


def test_fsdp_splits_weights_and_moments(tiny_model, tx):
    """Matrices and their moments: an eighth on each device; norms are whole everywhere."""
    _, state = state_on(tiny_model, tx, make_mesh(MeshConfig()))
    total = sum(a.nbytes for a in jax.tree.leaves(state))
    held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
    assert held < total / 8 * 1.2
    w = state.params["blocks"]["ffn"]["w1_DF"]
    assert w.addressable_shards[0].data.size * 8 == w.size


def test_no_device_ever_holds_a_whole_optimizer_state(tiny, tx):
    """In the program that makes the state: arguments, results and what is between, per device."""
    mesh = make_mesh(MeshConfig())
    _, like = abstract_state(lambda: InternLM2(tiny, rngs=nnx.Rngs(0)), tx, mesh)
    where = jax.tree.map(lambda a: a.sharding, like)
    with jax.set_mesh(mesh):
        begin = jax.jit(_initial(tx), donate_argnums=0, out_shardings=where)
        memory = begin.lower(like.params).compile().memory_analysis()
    total = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(like))
    held = memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert held < total / 8 * 1.2


def test_bf16_weights_become_float32(tiny, tiny_model, tx):
    mesh = make_mesh(MeshConfig())
    _, like = abstract_state(lambda: InternLM2(tiny, rngs=nnx.Rngs(0)), tx, mesh)
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny_model)
    params = params_of(model, like)
    np.testing.assert_array_equal(
        params["embed_VD"], np.asarray(model.embed_VD[...]).astype(np.float32)
    )


def test_a_mesh_that_does_not_divide_is_refused(tiny, tx):
    mesh = make_mesh(MeshConfig(tensor=8))  # 4 heads
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        abstract_state(lambda: InternLM2(tiny, rngs=nnx.Rngs(0)), tx, mesh)
