"""HF directories into models: files, types, meshes, and every way a checkpoint can be wrong."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.config import ModelConfig
from models.execution import Execution
from models.weights import hf_files
from models.weights.load import load, load_hf
from models.weights.save import save_hf
from models.weights.table import hf_tensors

WQKV = "model.layers.1.attention.wqkv.weight"


@pytest.fixture
def tensors(tiny_dir):
    return load_file(tiny_dir / "model.safetensors")


@pytest.fixture
def write(tmp_path, tiny_dir):
    """Write tensors as a HF directory, in one file or in shards with an index."""

    def write(tensors, *, shards=1, config=None):
        found = json.loads((tiny_dir / "config.json").read_text()) | (config or {})
        (tmp_path / "config.json").write_text(json.dumps(found))
        if shards == 1:
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path
        names = sorted(tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            weight_map |= dict.fromkeys(names[i::shards], file)
            save_file({n: tensors[n] for n in names[i::shards]}, tmp_path / file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return write


def same_as(model, tensors):
    """Return True if every parameter is exactly its HF tensor, rounded to the stored dtype."""
    for name, weight, i in hf_tensors(model.config):
        leaf = model
        for part in weight.path.split("."):
            leaf = getattr(leaf, part)
        array = np.asarray(leaf.get_value())
        got = weight.to_hf(array if i is None else array[i], model.config)
        np.testing.assert_array_equal(got, tensors[name].astype(got.dtype), err_msg=name)
    return True


def test_every_weight_is_its_tensor(tiny_dir, tensors):
    assert same_as(load_hf(tiny_dir, execution=Execution(dtype="float32")), tensors)


def test_default_is_bfloat16_and_masters_can_be_wider(tiny_dir, tensors):
    model = load_hf(tiny_dir)
    assert model.execution.dtype == jnp.bfloat16 and model.embed_VD.dtype == jnp.bfloat16
    assert same_as(model, tensors)
    model = load_hf(tiny_dir, execution=Execution(param_dtype="float32"))
    assert model.execution.dtype == jnp.bfloat16 and model.embed_VD.dtype == jnp.float32


def test_shards_with_an_index(write, tensors):
    assert same_as(load(write(tensors, shards=3), execution=Execution(dtype="float32")), tensors)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_stored_types(write, tensors, stored):
    rounded = {name: x.astype(stored) for name, x in tensors.items()}
    assert same_as(load_hf(write(rounded), execution=Execution(dtype="float32")), rounded)


def test_onto_a_mesh(tiny_dir, tensors, make_mesh):
    model = load_hf(tiny_dir, mesh=make_mesh(2, 2, 2), execution=Execution(dtype="float32"))
    w1 = model.blocks.ffn.w1_DF.get_value()
    assert {s.data.shape for s in w1.addressable_shards} == {(2, 32, 64)}
    assert same_as(model, tensors)


def test_biases_and_tied_embeddings(write, tensors):
    rng = np.random.default_rng(0)
    for name, weight, _ in list(hf_tensors(_tiny(bias=True))):
        if name not in tensors:
            tensors[name] = rng.normal(size=weight.hf_shape(_tiny())).astype(np.float32)
    config = {"bias": True, "tie_word_embeddings": True}
    model = load_hf(write(tensors, config=config), execution=Execution(dtype="float32"))
    assert not hasattr(model, "output_DV") and same_as(model, tensors)
    np.testing.assert_array_equal(model.unembedding(), np.asarray(model.embed_VD).T)


def test_rotary_tables_are_skipped(write, tensors):
    tensors["model.layers.0.attention.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    load_hf(write(tensors))


def test_llama_layout_loads_as_the_same_model(write, tensors, make_mesh, tmp_path):
    """With biases, onto a mesh; q, k and v of a layer in three files; a missing part is named."""
    config = {"bias": True}
    for i in range(2):
        wide = {"wqkv": (4 + 2 * 2) * 16, "wo": 64}
        for name, width in wide.items():
            bias = np.arange(width, dtype=np.float32)
            tensors[f"model.layers.{i}.attention.{name}.bias"] = bias
    ours = load_hf(write(tensors, config=config), execution=Execution(dtype="float32"))
    save_hf(ours, tmp_path / "llama", layout="llama")
    split = load_file(tmp_path / "llama" / "model.safetensors")
    named = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "model.safetensors").unlink()
    write(split, shards=3, config=named)
    for mesh in (None, make_mesh(1, 4, 2)):
        theirs = load_hf(tmp_path, mesh=mesh, execution=Execution(dtype="float32"))
        assert theirs.config == ours.config and same_as(theirs, tensors)
    del split["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"missing: model.layers.1.self_attn.k_proj.weight \["):
        load_hf(write(split, shards=3, config=named))


def test_all_wrong_tensors_are_named_at_once(write, tensors):
    wqkv = tensors.pop(WQKV)
    tensors["lm_head.weight"] = tensors.pop("output.weight")
    tensors["model.norm.weight"] = np.ones(32, np.float32)
    with pytest.raises(ValueError) as error:
        load_hf(write(tensors))
    message = str(error.value)
    assert "\n" not in message
    assert f"missing: {WQKV} {list(wqkv.shape)}" in message
    assert "output.weight [512, 64]" in message
    assert "unknown: lm_head.weight [512, 64]" in message
    assert "model.norm.weight [32] instead of [64]" in message


def test_truncated_file(tiny_dir, tmp_path):
    shutil.copyfile(tiny_dir / "config.json", tmp_path / "config.json")
    data = (tiny_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_hf(tmp_path)


def test_index_that_names_absent_shards(write, tensors):
    path = write(tensors, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"absent files: model-00002-of-00003\.safetensors"):
        load_hf(path)


def test_index_that_names_absent_tensors(write, tensors):
    path = write(tensors, shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names tensors that its files lack: ghost"):
        load_hf(path)


def test_unreadable_types_are_refused(write, tensors):
    tensors["model.norm.weight"] = np.ones(64, np.int8)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8"):
        load_hf(write(tensors))


def test_absent_directory_config_or_weights(tmp_path, tiny_dir):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_hf(tmp_path)
    shutil.copyfile(tiny_dir / "config.json", tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        load_hf(tmp_path)


def test_a_mesh_that_does_not_fit(tiny_dir, make_mesh):
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        load_hf(tiny_dir, mesh=make_mesh(1, 1, 8))


def test_one_file_is_open_at_a_time(write, tensors, monkeypatch):
    """While any tensor is read: so the host holds one shard, not the checkpoint."""
    opened: list = []
    open_file = hf_files._open

    def record(path):
        assert not any(file._exit_callbacks for file in opened)  # all have been closed
        opened.append(open_file(path))
        return opened[-1]

    monkeypatch.setattr(hf_files, "_open", record)
    assert same_as(load_hf(write(tensors, shards=3), execution=Execution(dtype="float32")), tensors)
    assert len(opened) == 6  # each once to look, once to read


def _tiny(**kwargs) -> ModelConfig:
    return ModelConfig(
        vocab_size=512,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=128,
        **kwargs,
    )


@pytest.mark.parametrize(("default", "index"), [(3, 3), ("cpu", 0)])
def test_arrays_land_on_the_default_device(tiny_dir, default, index):
    """The default is a device, or the name of a platform."""
    with jax.default_device(jax.devices()[default] if default == 3 else default):
        model = load_hf(tiny_dir)
    assert model.norm_D.get_value().devices() == {jax.devices()[index]}


def test_the_default_device_may_be_the_name_of_a_platform(tiny_dir, monkeypatch):
    """Weights go to the device that attention is resolved for, not to the machine's first one."""
    cpus = jax.local_devices(backend="cpu")
    monkeypatch.setattr(jax, "devices", lambda: cpus[3:])
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: cpus if backend else cpus[3:])
    with jax.default_device("cpu"):
        model = load_hf(tiny_dir)
    assert model.norm_D.get_value().devices() == {cpus[0]}


def test_a_lora_adapter_is_named(write, tensors, tmp_path):
    """Beside whole weights it is no matter."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="contains a LoRA adapter .* --adapter="):
        load(tmp_path)
    load(write(tensors))


@pytest.mark.parametrize("shard", [1, None, ["a"], "../model.safetensors", "/etc/passwd", ""])
def test_a_weight_map_names_files_of_its_directory(write, tensors, shard):
    path = write(tensors, shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map\['model.norm.weight'\]=.* must be the name"):
        load_hf(path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_fifo_or_a_pointer_as_weights(tiny_dir, tmp_path, name):
    shutil.copyfile(tiny_dir / "config.json", tmp_path / "config.json")
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        load_hf(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid a\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer"):
        load_hf(tmp_path)


def test_many_missing_tensors_are_counted(write, tensors):
    with pytest.raises(ValueError, match=r"missing: .* and 22 more$") as error:
        load_hf(write(tensors, config={"num_hidden_layers": 8}))
    assert str(error.value).count("model.layers.") == 20
