"""Configurations: released sizes, both HF spellings, and refusals."""

import dataclasses
import json
import re

import pytest

from models.config import NO_ID, PRESETS, ModelConfig, RopeScaling


@pytest.mark.parametrize(
    ("preset", "params"),
    [
        ("nano", 3_311_872),
        ("internlm2-1.8b", 1_889_110_016),
        ("internlm2-7b", 7_737_708_544),
        ("internlm2-20b", 19_861_149_696),
    ],
)
def test_presets_have_the_published_parameter_counts(preset, params):
    assert PRESETS[preset].num_params() == params


def test_released_presets_have_heads_of_128():
    # Fixtures of other tests add "tiny" for their session.
    presets = [config for name, config in PRESETS.items() if name != "tiny"]
    assert [c.head_dim for c in presets] == [64, 128, 128, 128]
    assert [c.group_size for c in presets] == [2, 2, 4, 6]


def test_from_hf_reads_a_released_config(tiny_dir):
    config = ModelConfig.from_hf(json.loads((tiny_dir / "config.json").read_text()))
    assert config == ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=128,
        rope_scaling=RopeScaling(type="dynamic", factor=2.0),
        max_position_embeddings=2048,
    )


def test_missing_keys_mean_the_defaults_of_the_original():
    """Not the released values: bias and eps differ from every release."""
    config = ModelConfig.from_hf({"model_type": "internlm2"})
    assert config == ModelConfig(
        vocab_size=103168,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        intermediate_size=11008,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=2048,
        bias=True,
        pad_token_id=0,
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scaling", [None, ("linear", 4.0), ("dynamic", 3.0)])
def test_to_hf_and_back_is_the_same(preset, scaling):
    config = dataclasses.replace(
        PRESETS[preset],
        rope_scaling=scaling and RopeScaling(type=scaling[0], factor=scaling[1]),
        bias=True,
        tie_word_embeddings=True,
    )
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


DYNAMIC = RopeScaling(type="dynamic", factor=2.0)


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 1000000, "rope_scaling": None}, 1e6, None),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1e6, DYNAMIC),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2}}, 1e6, DYNAMIC),
        (
            {
                "rope_parameters": {
                    "type": "dynamic",
                    "factor": 2.0,
                    "rope_theta": 1e6,
                    "rope_type": "dynamic",
                }
            },
            1e6,
            DYNAMIC,
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e7}}, 5e7, None),
        ({"rope_parameters": {"rope_theta": 5e7}}, 5e7, None),
    ],
)
def test_both_spellings_of_rope(keys, theta, scaling):
    config = ModelConfig.from_hf({"model_type": "internlm2", **keys})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_eos_may_be_a_list():
    config = ModelConfig.from_hf({"model_type": "internlm2", "eos_token_id": [2, 92542]})
    assert config.eos_token_id == 2


@pytest.mark.parametrize("key", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_null_is_no_token(key):
    config = ModelConfig.from_hf({"model_type": "internlm2", key: None})
    assert getattr(config, key) == NO_ID and config.to_hf()[key] is None
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True"),
        ({"model_type": "llama", "head_dim": 64}, "must be hidden_size / num_attention_heads"),
        ({"model_type": "llama", "head_dim": "x"}, "head_dim='x'"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1}}, "type='llama3'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"hidden_size": 100}, "hidden_size=100 must be a multiple of num_heads=32"),
        ({"num_key_value_heads": 5}, "num_heads=32 must be a multiple of num_kv_heads=5"),
        ({"hidden_size": 96}, "head_dim=3"),
        ({"num_hidden_layers": 0}, "num_layers=0 must be positive"),
        ({"rope_scaling": "dynamic"}, "rope_scaling='dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "'beta'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "differ"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "contradicts"),
        ({"rope_theta": "abc"}, "rope_theta='abc' in config.json must be a number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf in config.json must be a finite number"),
        ({"vocab_size": "320"}, "vocab_size='320' in config.json must be a whole number"),
        ({"hidden_size": 64.0}, "hidden_size=64.0 in config.json must be a whole number"),
        ({"hidden_size": None}, "hidden_size=None in config.json must be a whole number"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None in config.json must be a finite number"),
        ({"bias": "false"}, "bias='false' in config.json must be true or false"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000 must be at most 4,096"),
        ({"vocab_size": 10**18}, "vocab_size=1000000000000000000 must be at most 16,777,216"),
        ({"hidden_size": 10**400}, "hidden_size=1000000000"),
        ({"max_position_embeddings": 1 << 31}, "must be at most 2,147,483,647"),
        ({"eos_token_id": 10**30}, "must be below 2^31"),
        ({"rope_theta": 10**400}, "rope_theta=inf in config.json must be a finite number"),
        ({"rms_norm_eps": 10**400}, "in config.json must be a finite number"),
        ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "at most 1e+06"),
        ({"pad_token_id": True}, "pad_token_id=True in config.json must be a whole number"),
    ],
)
def test_from_hf_refuses(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        ModelConfig.from_hf({"model_type": "internlm2", **keys})
    assert "\n" not in str(error.value)
