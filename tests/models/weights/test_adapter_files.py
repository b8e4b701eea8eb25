"""PEFT directories: what is written is read, and what is not for this model is refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.config import ModelConfig
from models.execution import Execution
from models.internlm2 import init
from models.lora import LoRA, adapter_params
from models.weights.adapter_files import CONFIG, WEIGHTS, load_adapter, save_adapter

MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)
ADAPTERS = LoRA(rank=3, alpha=6.0, dropout=0.1, rslora=True)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(
        lambda: init(MODEL, execution=Execution(dtype="float32", lora=ADAPTERS))
    )
    rng = np.random.default_rng(0)
    return {
        target: tuple(rng.normal(size=x.shape).astype(np.float32) for x in pair)
        for target, pair in adapter_params(shapes).items()
    }


@pytest.fixture(params=["internlm2", "llama"])
def written(request, params, tmp_path):
    directory = tmp_path / "adapter"
    save_adapter(directory, MODEL, ADAPTERS, params, base="base", layout=request.param)
    return directory


def change(directory, **fields):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields))


def test_what_is_written_is_read(written, params):
    """Numbers and arrays, in both layouts."""
    lora, got = load_adapter(written, MODEL)
    assert lora == ADAPTERS
    for target, pair in params.items():
        for ours, want in zip(got[target], pair, strict=True):
            np.testing.assert_array_equal(ours, want)


def test_names_are_those_of_peft(params, tmp_path):
    """A [R, in] and B [out, R] of each linear layer, and of q, k and v in Llama's layout."""
    for layout, name, rows in (
        ("internlm2", "base_model.model.model.layers.1.attention.wqkv", 64),
        ("llama", "base_model.model.model.layers.1.self_attn.k_proj", 16),
    ):
        directory = tmp_path / layout
        save_adapter(directory, MODEL, ADAPTERS, params, base="the/base", layout=layout)
        tensors = load_file(directory / WEIGHTS)
        assert tensors[f"{name}.lora_A.weight"].shape == (3, 32)
        assert tensors[f"{name}.lora_B.weight"].shape == (rows, 3)
        config = json.loads((directory / CONFIG).read_text())
        assert config["base_model_name_or_path"] == "the/base"
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6.0, True)
        assert len(tensors) == 2 * 2 * len(config["target_modules"])


def test_some_targets(params, tmp_path):
    lora = dataclasses.replace(ADAPTERS, targets=("wo", "w2"))
    some = {t: params[t] for t in lora.targets}
    save_adapter(tmp_path / "a", MODEL, lora, some, base="base", layout="llama")
    got, arrays = load_adapter(tmp_path / "a", MODEL)
    assert got == lora and set(arrays) == {"wo", "w2"}


def test_an_adapter_of_another_base_is_refused(written):
    """All tensors that differ are named, with both shapes."""
    other = dataclasses.replace(MODEL, intermediate_size=64, num_layers=1)
    with pytest.raises(ValueError, match="belongs to another base model: ") as error:
        load_adapter(written, other)
    message = str(error.value)
    assert message.count("[3, 32] is unknown in 1 layer") >= 3  # the layer that the model lacks
    assert message.count("lora_B.weight is [48, 3] instead of [64, 3] in 1 layer") == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' must be 'LORA'"),
        ({"use_dora": True}, "uses use_dora, which is not supported"),
        ({"bias": "all"}, "bias='all' must be 'none'"),
        ({"modules_to_save": ["output"]}, "uses modules_to_save"),
        ({"rank_pattern": {"wo": 2}}, "uses rank_pattern"),
        ({"r": "many"}, "does not describe a LoRA adapter"),
        ({"r": 0}, "lora rank=0 must be at least 1"),
    ],
)
def test_what_is_not_plain_lora_is_refused(written, fields, message):
    change(written, **fields)
    with pytest.raises(ValueError, match=message):
        load_adapter(written, MODEL)


def test_damaged_files_are_refused(written):
    whole = (written / WEIGHTS).read_bytes()
    (written / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_adapter(written, MODEL)
    (written / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        load_adapter(written, MODEL)


def test_q_k_v_with_different_a_are_refused(params, tmp_path):
    directory = tmp_path / "a"
    save_adapter(directory, MODEL, ADAPTERS, params, base="base", layout="llama")
    tensors = load_file(directory / WEIGHTS)
    tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] += 1
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="q, k and v of layer 0 have different lora_A"):
        load_adapter(directory, MODEL)
