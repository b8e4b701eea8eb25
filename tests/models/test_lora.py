"""Adapters: nothing changes at the start, only they get gradients, any mesh gives the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.execution import Execution
from models.internlm2 import init
from models.lora import Adapter, LoRA, LoRAParam, adapter_params, merged

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=128,
    max_position_embeddings=64,
)
ADAPTERS = LoRA(rank=4, alpha=8.0, dropout=0.25)
TOKENS = np.arange(8 * 16).reshape(8, 16) * 7 % 96


def execution(**changes) -> Execution:
    return Execution(dtype="float32", attn="xla", **changes)


def with_values(model, seed=0):
    """Fill B, which starts at zero, with random numbers."""
    for adapters in (model.blocks.attention.lora, model.blocks.ffn.lora):
        for i, adapter in enumerate(adapters.values()):
            key = jax.random.fold_in(jax.random.key(seed), i)
            adapter.b[...] = 0.05 * jax.random.normal(key, adapter.b.shape)
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "lora rank=0 must be at least 1"),
        ({"alpha": 0.0}, "lora alpha=0.0 must be above 0"),
        ({"dropout": 1.0}, r"lora dropout=1.0 must be in \[0, 1\)"),
        ({"targets": ("wq",)}, "lora targets=wq must be one or more of wqkv, wo, w1, w3, w2"),
        ({"targets": ()}, "lora targets= must be one or more"),
        ({"targets": ("w1", "w1")}, "lora targets=w1,w1 must be one or more"),
    ],
)
def test_impossible_adapters_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ADAPTERS, **changes)


def test_rank_is_at_most_the_smaller_side():
    lora = dataclasses.replace(ADAPTERS, rank=129)
    with pytest.raises(ValueError, match="lora rank=129 exceeds a linear layer of 128 x "):
        jax.eval_shape(lambda: init(CONFIG, execution=execution(lora=lora)))


@pytest.mark.parametrize("scan", [True, False])
def test_a_new_adapter_changes_nothing(scan):
    """B is zero, and the base draws the same weights with and without adapters."""
    want = init(CONFIG, execution=execution(scan=scan))(TOKENS)
    got = init(CONFIG, execution=execution(scan=scan, lora=ADAPTERS))(TOKENS)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_is_drawn_as_peft_draws_it():
    """A is uniform in +-1 / sqrt(inputs), anew for each layer and target; B is zero."""
    lora = dataclasses.replace(ADAPTERS, rank=64)
    model = init(CONFIG, execution=execution(lora=lora))
    params = adapter_params(model)
    bound = 1 / np.sqrt(128)
    for a, b in params.values():
        a = np.asarray(a)
        assert not np.asarray(b).any()
        assert np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.02)
        assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(np.asarray(params["w1"][0]), np.asarray(params["w3"][0]))


def loss_and_gradients(model, key=None):
    graphdef, trained, frozen = nnx.split(model, LoRAParam, ...)

    def loss(trained):
        hidden = nnx.merge(graphdef, trained, frozen).hidden(TOKENS, dropout=key)
        return jnp.mean(jnp.square(hidden - 1))

    value, gradients = jax.jit(jax.value_and_grad(loss))(trained)
    return float(value), [np.asarray(g) for g in jax.tree.leaves(gradients)]


@pytest.mark.parametrize(
    ("quantize", "sizes"), [(None, (2, 2, 1, 2)), ("nf4", (2, 2, 2)), ("int8", (2, 2, 1, 2))]
)
def test_any_mesh_gives_the_same(make_mesh, quantize, sizes):
    """Loss and gradients, with dropout, on 8 devices and with unrolled layers."""
    options = execution(lora=ADAPTERS, quantize=quantize)
    key = jax.random.key(3)
    want = loss_and_gradients(with_values(init(CONFIG, execution=options)), key)
    mesh, options = make_mesh(*sizes), dataclasses.replace(options, scan=False)
    with jax.set_mesh(mesh):
        got = loss_and_gradients(with_values(init(CONFIG, mesh=mesh, execution=options)), key)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for ours, theirs in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_frozen_weights_get_no_gradient_products():
    """The unrolled program has fewer products than one that trains all weights: 4 N, not 6 N."""

    def products(options, trained_type):
        model = jax.eval_shape(lambda: init(CONFIG, execution=options))
        graphdef, trained, frozen = nnx.split(model, trained_type, ...)

        def loss(trained, frozen):
            return jnp.sum(nnx.merge(graphdef, trained, frozen).hidden(TOKENS))

        compiled = jax.jit(jax.grad(loss)).lower(trained, frozen).compile()
        return compiled.cost_analysis()["flops"]

    lora = dataclasses.replace(ADAPTERS, rank=1)
    options = execution(scan=False, remat="dots")
    full = products(options, nnx.Param)
    adapters = products(dataclasses.replace(options, lora=lora), LoRAParam)
    assert adapters < 0.75 * full


def test_dropout_scales_what_it_keeps():
    """Of an adapter's inputs a quarter is zero and the rest is larger; one key, one result."""
    lora = LoRA(rank=64, alpha=64.0, dropout=0.25)
    adapter = Adapter(lora, (64, 64), (None, None), inputs=1, key=jax.random.key(0))
    adapter.a[...] = adapter.b[...] = jnp.eye(64)

    def run(key):
        axes = {"x_axes": (None,) * 3, "out": (None,) * 3}
        return np.asarray(adapter("BTD,DF->BTF", jnp.ones((2, 256, 64)), key=key, **axes))

    out = run(jax.random.key(1))
    np.testing.assert_array_equal(np.unique(out), np.float32([0, 1 / 0.75]))
    assert abs((out == 0).mean() - 0.25) < 0.01
    np.testing.assert_array_equal(out, run(jax.random.key(1)))
    assert not np.array_equal(out, run(jax.random.key(2)))
    np.testing.assert_array_equal(run(None), 1)


def test_merged_weights_compute_the_same(exact):
    model = with_values(init(CONFIG, execution=execution(lora=ADAPTERS)))
    want = model(TOKENS)
    plain = init(CONFIG, execution=execution())
    for target, (a_L, b_L) in adapter_params(model).items():
        module = plain.blocks.attention if target in ("wqkv", "wo") else plain.blocks.ffn
        name = {"wqkv": "wqkv_DKgH", "wo": "wo_NHD", "w2": "w2_FD"}.get(target, f"{target}_DF")
        param = getattr(module, name)
        param[...] = jnp.stack(
            [merged(w, a, b, ADAPTERS) for w, a, b in zip(param[...], a_L, b_L, strict=True)]
        )
    np.testing.assert_allclose(np.asarray(plain(TOKENS)), np.asarray(want), atol=1e-5)
