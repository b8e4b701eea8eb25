"""Tiles of tokens change the memory of a step, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models import sharding
from models.config import ModelConfig
from models.execution import Execution
from models.internlm2 import init
from models.lora import LoRA
from models.tiles import divides, over_tiles, tile_count

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    intermediate_size=128,
    max_position_embeddings=64,
    bias=True,
)
B, T = 4, 48
TOKENS = np.arange(B * T, dtype=np.int32).reshape(B, T) * 7 % 64
SEGMENTS = np.sort(TOKENS, axis=1) // 16  # documents of several tiles, and padding


@functools.cache
def loss_and_grads(mesh=None, **options):
    model = init(CONFIG, mesh=mesh, execution=Execution(attn="xla", dtype="float32", **options))

    def loss(model, key):
        weights = jnp.cos(jnp.arange(B * T * 128, dtype=jnp.float32)).reshape(B, T, 128)
        x_BTD = model.hidden(TOKENS, segment_ids=SEGMENTS, dropout=key)
        return jnp.mean(x_BTD * sharding.constrain(weights, "batch", "seq", None)) * 100

    key = None if options.get("lora") is None else jax.random.key(0)
    grad = jax.value_and_grad(loss, allow_int=True)
    with sharding.mesh_of(model.norm_D[...]):
        value, grads = jax.jit(grad)(model, key)
    floats = [x for x in jax.tree.leaves(grads) if x.dtype == jnp.float32]
    return value, [np.asarray(x) for x in floats]


def assert_same(found, wanted, tolerance):
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
    for got, want in zip(found[1], wanted[1], strict=True):
        assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-6)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"remat": "qkv", "scan": False}, 1e-5),
        ({"remat": "offload_input,full"}, 1e-5),
        # Each tile has scales of its own.
        ({"remat": "full", "matmul": "fp8"}, 0.2),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_whole_rows(exact, options, tolerance):
    whole = {"matmul": "bf16"} | options | {"remat": "full", "scan": True}
    assert_same(loss_and_grads(**options, tile_size=16), loss_and_grads(**whole), tolerance)


@pytest.mark.parametrize(("sizes", "tile_size"), [((2, 2, 2), 16), ((1, 2, 1, 2), 8)])
def test_over_a_mesh(exact, make_mesh, sizes, tile_size):
    """Also over one that splits T: a device has 24 tokens of a row then, in three tiles."""
    tiled = loss_and_grads(make_mesh(*sizes), remat="full", tile_size=tile_size)
    assert_same(tiled, loss_and_grads(matmul="bf16", remat="full", scan=True), 1e-5)


def test_adapters(exact):
    """Frozen weights are dequantized once, and get no gradient."""
    options = {"remat": "full", "lora": LoRA(rank=4, alpha=8.0), "quantize": "nf4"}
    tiled, whole = (loss_and_grads(**options, tile_size=size) for size in (16, None))
    moving = [i for i, x in enumerate(tiled[1]) if np.any(x)]
    assert len(moving) == 5 + 2  # B of every adapter (A moves once B is not 0); embedding and norm
    tiled, whole = ((loss, [grads[i] for i in moving]) for loss, grads in (tiled, whole))
    assert_same(tiled, whole, 1e-5)


def test_dropout_differs_from_tile_to_tile():
    ones = jnp.ones((1, 64, 8))

    def drop(trained, frozen, key, x):
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)

    kept = over_tiles(drop, (), (), jax.random.key(0), ones, tile_size=16)
    first, *others = np.split(np.asarray(kept), 4, axis=1)
    assert 0.3 < kept.mean() < 0.7 and all((first != other).any() for other in others)


def product(w, frozen, key, x):
    return x @ w


def test_parts_of_a_gradient_are_summed_in_float32():
    """A sum in bfloat16 stops at 256: it has no number between 256 and 258."""
    x, w = jnp.ones((1, 512, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16)
    dw = jax.grad(lambda w: over_tiles(product, w, (), (), x, tile_size=1).sum())(w)
    assert dw.dtype == jnp.bfloat16 and dw.item() == 512


def test_rows_that_a_mesh_splits(make_mesh):
    """A tile has tokens of every device; nothing is gathered."""
    mesh = make_mesh(1, 1, 1, 4)
    x, w = jax.random.normal(jax.random.key(0), (2, 64, 8)), jnp.eye(8)[:, :4]

    def run(x, w):
        y = over_tiles(product, w, (), (), x, tile_size=4)
        return jnp.sum(jnp.sin(y)), y

    grad = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
    want, _ = grad(x, w)
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, P(None, "seq"))
        got, y = grad(jax.device_put(x, place), w)
        assert jax.typeof(y).sharding.spec == P(None, "seq", None)
        text = grad.lower(jax.device_put(x, place), w).compile().as_text()
    assert text is not None and "all-gather" not in text
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_memory_of_a_row_does_not_grow_with_the_feed_forward_layer():
    wide = dataclasses.replace(CONFIG, intermediate_size=4096, num_layers=1)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def temporary(tile_size):
        execution = Execution(attn="cudnn", dtype="float32", tile_size=tile_size)
        model = jax.eval_shape(lambda: init(wide, execution=execution))

        def loss(model, tokens):
            x_BTD, _ = model.run_blocks(
                model.embed(tokens),
                (jnp.ones((1, 2048, 1, 32)),) * 2,
                lambda q, k, v, _: (q, None),
                tile_size=tile_size,
            )
            return x_BTD.sum()

        compiled = jax.jit(jax.grad(loss)).lower(model, tokens).compile()
        found = compiled.memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    assert temporary(128) < 0.25 * temporary(None)


def test_tiles_divide_the_row():
    assert tile_count(100, None) == 1 and tile_count(64, 100) == 1
    assert (tile_count(64, 16), tile_count(96, 40)) == (4, 3)  # 40 does not divide 96, 32 does
    assert divides(96, 40) and not divides(97, 40)
    with pytest.raises(ValueError, match="tile_size=40 does not divide a row of 97 tokens") as why:
        tile_count(97, 40)
    assert "\n" not in str(why.value)
