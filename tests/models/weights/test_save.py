"""Models into HF directories: bytes, shards, both layouts, and what lies beside the weights."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from models.config import ModelConfig, RopeScaling
from models.execution import Execution
from models.internlm2 import init
from models.tokenizer import load_tokenizer
from models.weights import llama
from models.weights.hf_files import HFDirectory
from models.weights.load import load_hf
from models.weights.safetensors_file import SafetensorsWriter
from models.weights.save import save_hf

SMALL = ModelConfig(
    vocab_size=131,  # like no release, and odd
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=1,
    intermediate_size=40,
)


@pytest.fixture(scope="module")
def tiny(tiny_dir):
    return load_hf(tiny_dir, execution=Execution(dtype="float32"))


@pytest.fixture(scope="module")
def tensors(tiny_dir):
    return load_file(tiny_dir / "model.safetensors")


def tensors_of(directory):
    files = HFDirectory(directory)
    return dict(files.read(files.shapes))


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.dtype == want[name].dtype and x.tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("mesh_shape", [None, (1, 4, 2)])
def test_every_tensor_has_the_bytes_it_had(tiny_dir, tensors, make_mesh, tmp_path, mesh_shape):
    """From one device and from a mesh that splits every axis it can."""
    mesh = mesh_shape and make_mesh(*mesh_shape)
    save_hf(load_hf(tiny_dir, mesh=mesh, execution=Execution(dtype="float32")), tmp_path / "dst")
    assert_same(tensors_of(tmp_path / "dst"), tensors)


def test_another_type_is_rounded_as_numpy_rounds(tiny, tensors, tmp_path):
    save_hf(tiny, tmp_path / "dst", dtype="bfloat16")
    assert_same(tensors_of(tmp_path / "dst"), {n: x.astype("bfloat16") for n, x in tensors.items()})
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_hold_what_they_may_and_the_index_names_all(tiny, tensors, tmp_path):
    """In the order of a forward pass; each says that it follows PyTorch's conventions."""
    save_hf(tiny, tmp_path / "dst", max_shard_bytes=150_000)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert next(iter(index["weight_map"])) == "model.tok_embeddings.weight"
    assert list(index["weight_map"])[-1] == "output.weight"
    for name in names:
        with safe_open(tmp_path / "dst" / name, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            inside = {n: file.get_tensor(n) for n in file.keys()}
        assert {index["weight_map"][n] for n in inside} == {name}
        assert sum(x.nbytes for x in inside.values()) <= 150_000
    assert_same(tensors_of(tmp_path / "dst"), tensors)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"bias": True, "rope_scaling": RopeScaling(type="dynamic", factor=3.0)},
        {"tie_word_embeddings": True, "rope_scaling": RopeScaling(type="linear", factor=4.0)},
        {"bias": True, "tie_word_embeddings": True, "rope_theta": 1e4},
    ],
    ids=lambda change: "-".join(change) or "plain",
)
def test_every_configuration_goes_out_and_in(tmp_path, change):
    """Biases, tied embeddings, every rope scaling, groups of 6, an odd vocabulary."""
    config = dataclasses.replace(SMALL, rms_norm_eps=1e-6, **change)
    model = init(config, execution=Execution(dtype=jnp.float32))
    save_hf(model, tmp_path / "dst")
    again = load_hf(tmp_path / "dst", execution=Execution(dtype="float32"))
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again, model)
    hf = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert "auto_map" not in hf  # it would name code that is not there
    assert ("output.weight" in tensors_of(tmp_path / "dst")) is not config.tie_word_embeddings


def test_llama_layout_un_fuses_wqkv(tmp_path):
    """Rows of q, k and v come from the slots of their kv head; everything else is renamed."""
    config = dataclasses.replace(SMALL, num_kv_heads=2, bias=True)
    model = init(config, execution=Execution(dtype=jnp.float32))
    save_hf(model, tmp_path / "ours")
    save_hf(model, tmp_path / "llama", layout="llama")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(tmp_path / "llama" / "model.safetensors")
    H, G = config.head_dim, config.group_size
    wqkv = ours.pop("model.layers.1.attention.wqkv.weight")
    slot = {(k, s): wqkv[(k * (G + 2) + s) * H :][:H] for k in range(2) for s in range(G + 2)}
    prefix = "model.layers.1.self_attn."
    for part, heads in {
        "q": [(k, s) for k in range(2) for s in range(G)],
        "k": [(k, G) for k in range(2)],
        "v": [(k, G + 1) for k in range(2)],
    }.items():
        want = np.concatenate([slot[h] for h in heads])
        np.testing.assert_array_equal(theirs[f"{prefix}{part}_proj.weight"], want)
    assert theirs[f"{prefix}q_proj.bias"].shape == (48,)
    for a, b in (
        ("model.tok_embeddings.weight", "model.embed_tokens.weight"),
        ("model.layers.0.attention.wo.bias", "model.layers.0.self_attn.o_proj.bias"),
        ("model.layers.2.feed_forward.w1.weight", "model.layers.2.mlp.gate_proj.weight"),
        ("model.layers.2.feed_forward.w2.weight", "model.layers.2.mlp.down_proj.weight"),
        ("model.layers.2.feed_forward.w3.weight", "model.layers.2.mlp.up_proj.weight"),
        ("model.layers.1.attention_norm.weight", "model.layers.1.input_layernorm.weight"),
        ("model.layers.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        np.testing.assert_array_equal(theirs[b], ours[a])
    hf = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert hf["model_type"] == "llama" and hf["attention_bias"] and not hf["mlp_bias"]
    assert len(theirs) == 3 + 3 * (2 * 4 + 5)


def test_llama_config_names_no_code():
    hf = llama.hf_config(SMALL, dtype="bfloat16")
    assert hf["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in hf


@pytest.fixture
def beside(tiny_dir, tmp_path):
    """Make a chat model's directory as on the hub: code, a tokenizer of remote class, license."""
    path = tmp_path / "beside"
    shutil.copytree(tiny_dir.parent / "tokenizer_tiny_spm", path)
    config = json.loads((tiny_dir / "config.json").read_text()) | {"pretraining_tp": 1}
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_internlm2.py").write_text("raise SystemExit('is not run')")
    (path / "LICENSE").write_text("Apache")
    for weights in ("pytorch_model.bin", "model.safetensors.index.json", "optimizer.pt"):
        (path / weights).write_text("old weights")
    (path / ".git").mkdir()
    return path


def test_what_lay_beside_the_weights_goes_along(tiny, beside, tmp_path):
    """But no weights; config.json keeps the keys that only transformers knows."""
    save_hf(tiny, tmp_path / "dst", assets_from=beside)
    names = {p.name for p in (tmp_path / "dst").iterdir()}
    assert names >= {"modeling_internlm2.py", "LICENSE", "tokenizer.model", "tokenizer_config.json"}
    assert not names & {"pytorch_model.bin", "model.safetensors.index.json", "optimizer.pt", ".git"}
    hf = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert hf == json.loads((beside / "config.json").read_text())


def test_another_sidecar_config_does_not_win(beside, tmp_path):
    """A model that is not what lies there is described as it is, with the code there."""
    config = dataclasses.replace(SMALL, vocab_size=513)
    model = init(config, execution=Execution(dtype=jnp.float32))
    save_hf(model, tmp_path / "dst", assets_from=beside)
    hf = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert ModelConfig.from_hf(hf) == config and "AutoModel" in hf["auto_map"]


def test_a_chat_model_stops_at_im_end(tiny, beside, tmp_path):
    """Its id joins the eos ids; a model whose tokenizer has no chat template keeps its own."""
    save_hf(tiny, tmp_path / "chat", assets_from=beside)
    generation = json.loads((tmp_path / "chat" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [2, 510]}
    config = json.loads((beside / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (beside / "tokenizer_config.json").write_text(json.dumps(config))
    (beside / "generation_config.json").write_text('{"eos_token_id": [2], "top_p": 0.8}')
    save_hf(tiny, tmp_path / "base", assets_from=beside)
    generation = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and generation["top_p"] == 0.8


def test_llama_layout_needs_no_code_of_its_own(tiny, beside, tmp_path):
    """No modeling code, and the tokenizer becomes one that AutoTokenizer loads by itself."""
    from transformers import AutoTokenizer

    save_hf(tiny, tmp_path / "dst", assets_from=beside, layout="llama")
    assert not list((tmp_path / "dst").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "dst" / "tokenizer_config.json").read_text())
    text = "def f(x):\n    return x  # 你好<|im_end|>"
    want = load_tokenizer(beside).encode(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert theirs(text, add_special_tokens=False)["input_ids"] == want
    assert load_tokenizer(tmp_path / "dst").encode(text) == want
    assert theirs.chat_template


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layout": "gpt"}, "layout='gpt' must be one of internlm2, llama"),
        ({"dtype": "int8"}, "dtype='int8' must be one of float32, bfloat16, float16"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 must be at least 1"),
    ],
)
def test_what_cannot_be_written_is_refused(tiny, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        save_hf(tiny, tmp_path / "dst", **kwargs)
    assert not (tmp_path / "dst").exists()


def test_an_absent_companion_or_a_present_destination(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        save_hf(tiny, tmp_path / "dst", assets_from=tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="exists: choose another name"):
        save_hf(tiny, tmp_path)


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    """Though some tensors were written already."""
    written = []
    put = SafetensorsWriter.put

    def fail_third(self, name, x):
        written.append(put(self, name, x))
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "put", fail_third)
    with pytest.raises(OSError, match="No space left"):
        save_hf(tiny, tmp_path / "dst", max_shard_bytes=150_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["internlm2", "llama"])
def test_overflow_is_refused_with_tensor_count_and_value(tiny_dir, tmp_path, layout):
    """Values that are not finite before are no overflow: they are written as they are."""
    model = load_hf(tiny_dir, execution=Execution(dtype="float32"))
    wo = model.blocks.attention.wo_NHD
    wo[...] = (
        wo[...].at[1, 0, 0, :2].set(np.array([-1e6, 7e4], np.float32)).at[0, 0, 0, 0].set(np.inf)
    )
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.attention\.wo\.weight: 2 of 4096 values overflow in float16 "
        r"\(largest 1e\+06, limit 65504\): take bfloat16",
    ):
        save_hf(model, tmp_path / "dst", dtype="float16", layout=layout)
    assert not list(tmp_path.iterdir())
    save_hf(model, tmp_path / "dst", dtype="bfloat16", layout=layout)
