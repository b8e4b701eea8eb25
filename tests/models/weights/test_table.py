"""The weight table: names and shapes of a real checkpoint, and two directions that are inverse."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from models.config import PRESETS, ModelConfig
from models.weights.table import hf_tensors, is_known_extra, table

CONFIG = PRESETS["nano"]


def test_names_and_shapes_are_those_of_the_golden_checkpoint(tiny_dir):
    config = ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=128,
    )
    with safe_open(tiny_dir / "model.safetensors", framework="np") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert {name: weight.hf_shape(config) for name, weight, _ in hf_tensors(config)} == stored


def test_released_shapes():
    """The wqkv of 7B and 20B are (6144, 4096) and (8192, 6144)."""
    shapes = {
        name: {w.hf: w.hf_shape(PRESETS[name]) for w in table(PRESETS[name])}
        for name in ("internlm2-7b", "internlm2-20b")
    }
    wqkv = "model.layers.{i}.attention.wqkv.weight"
    assert shapes["internlm2-7b"][wqkv] == (6144, 4096)
    assert shapes["internlm2-20b"][wqkv] == (8192, 6144)


def test_bias_and_tying_change_the_table():
    names = {name for name, *_ in hf_tensors(dataclasses.replace(CONFIG, bias=True))}
    assert "model.layers.3.attention.wqkv.bias" in names
    assert "model.layers.3.attention.wo.bias" in names
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert "output.weight" not in {name for name, *_ in hf_tensors(tied)}


@pytest.mark.parametrize(
    "weight", table(dataclasses.replace(CONFIG, bias=True)), ids=lambda w: w.path
)
def test_from_hf_and_to_hf_are_inverse(weight):
    size = int(np.prod(weight.hf_shape(CONFIG)))
    x = np.arange(size, dtype=np.float32).reshape(weight.hf_shape(CONFIG))
    ours = np.asarray(weight.from_hf(jnp.asarray(x), CONFIG))
    np.testing.assert_array_equal(weight.to_hf(ours, CONFIG), x)


def test_wqkv_slots():
    """Row (k * g + s) * H + h of wqkv is slot s of kv head k: queries first, then k, then v."""
    (weight,) = (w for w in table(CONFIG) if w.path.endswith("wqkv_DKgH"))
    rows, D = weight.hf_shape(CONFIG)
    x = np.broadcast_to(np.arange(rows, dtype=np.float32)[:, None], (rows, D))
    ours = np.asarray(weight.from_hf(jnp.asarray(x), CONFIG))
    g, H = CONFIG.group_size + 2, CONFIG.head_dim
    assert ours.shape == (D, CONFIG.num_kv_heads, g, H)
    assert (ours[:, 1, 2, 5] == (1 * g + 2) * H + 5).all()


def test_known_extras_are_rotary_tables_and_a_tied_output():
    assert is_known_extra("model.layers.0.attention.rotary_emb.inv_freq", CONFIG)
    assert not is_known_extra("output.weight", CONFIG)
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert is_known_extra("output.weight", tied)
    assert not is_known_extra("v_head.weight", CONFIG)
