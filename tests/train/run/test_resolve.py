"""What is chosen where nothing is said, and what is refused before any work."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

import jaxattn
from models.config import PRESETS
from tests.jaxattn.interpret import hopper
from train.attention import resolve_attention
from train.config.config import Config
from train.config.sections import MeshConfig, OptimConfig
from train.distributed.mesh import make_mesh
from train.run.parts import model_maker
from train.run.resolve import choose_model, settle

DATA = Path(__file__).parents[2] / "data"


def test_cpu_defaults():
    settled = settle(Config())
    assert settled.name == "nano" and settled.model == PRESETS["nano"]
    assert settled.dtype == jnp.dtype("float32") and settled.attn == "xla"
    assert settled.rows * 512 == 4096  # 2,048 tokens would leave devices without a row
    assert str(settled.out) == "runs/nano-512" and settled.lr == 2e-3
    assert settled.tokenizer.name == "byte"
    assert any("no GPU" in note for note in settled.notes)


def test_flags_win(tiny):
    settled = settle(
        Config(
            model="tiny",
            batch_size=16,
            grad_accum=2,
            attn="sdpa",
            dtype="bfloat16",
            remat="qkv",
            scan_layers=False,
            out="here",
            optim=OptimConfig(lr=1.0),
            mesh=MeshConfig(data=2),
        )
    )
    assert settled.notes == () and settled.model is PRESETS["tiny"]
    assert (settled.rows, settled.attn, settled.lr, str(settled.out)) == (16, "xla", 1.0, "here")
    assert settled.dtype == jnp.dtype("bfloat16")
    assert (settled.remat, settled.scan) == ("qkv", False)
    assert dict(settled.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}


def test_remat_is_chosen_and_said(tiny):
    settled = settle(Config(model="tiny"))
    assert settled.remat == "dots" and "remat dots: the fastest that fits" in settled.notes[-1]
    assert settled.scan  # on a CPU


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_model(deterministic, tiny):
    config = Config(model="tiny", deterministic=deterministic)
    model = nnx.eval_shape(model_maker(config, settle(config)))
    assert model.deterministic is deterministic


def test_deterministic_cudnn_is_refused(tiny, monkeypatch):
    """Before a run starts: the model is not made, nothing is written."""
    monkeypatch.setattr(jaxattn.device, "default_device", hopper)
    shape = {"rows": 8, "seq_len": 64, "dtype": jnp.bfloat16, "documents": False}
    mesh = make_mesh(MeshConfig())
    assert resolve_attention("cudnn", PRESETS["tiny"], mesh, **shape) == "cudnn"
    with pytest.raises(NotImplementedError, match="deterministic=True.*use impl='pallas'"):
        resolve_attention("cudnn", PRESETS["tiny"], mesh, **shape, deterministic=True)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model": "nono"}, ValueError, "--model=nono is no preset .nano, .* and no directory"),
        ({"model": "tests"}, ValueError, "--model=tests .* a directory without config.json"),
        ({"attn": "palas"}, ValueError, "unknown attention implementation 'palas'"),
        ({"attn": "pallas"}, NotImplementedError, "'pallas' cannot run.*Hopper.*use impl='xla'"),
        (
            {"remat": "some"},
            ValueError,
            "--remat=some must be one of none, dots, qkv",
        ),
        ({"batch_size": 6}, ValueError, "--batch_size=6 must be a multiple of 8"),
        ({"tokenizer": "nowhere"}, OSError, "nowhere does not exist"),
        (
            {"attn": "eager", "seq_len": 32768, "batch_size": 64},
            NotImplementedError,
            "score matrix of 32768 x 32768 tokens would need .* GiB",
        ),
        ({"model": "internlm2-20b"}, ValueError, "the run needs about .* GiB per device"),
    ],
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        settle(Config(**kwargs))
    assert "\n" not in str(caught.value)


def test_offload_needs_pinned_memory(tiny, monkeypatch):
    monkeypatch.setattr("train.run.resolve._memories", lambda _: {"device"})
    with pytest.raises(NotImplementedError, match="needs pinned host memory.*take --remat=full"):
        settle(Config(model="tiny", remat="offload"))


@pytest.mark.parametrize("kind", ["tokenizer_tiny", "tokenizer_tiny_spm"])
def test_trained_weights_bring_their_tokenizer(kind, tiny, tmp_path):
    """Of either kind; where they have none, nobody guesses."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_hf() | {"vocab_size": 2000}))
    with pytest.raises(ValueError, match="nor tokenizer.model: name one with --tokenizer"):
        settle(Config(model=str(tmp_path)))
    assert settle(Config(model=str(tmp_path), tokenizer="byte")).tokenizer.name == "byte"
    shutil.copytree(DATA / kind, tmp_path, dirs_exist_ok=True)
    assert settle(Config(model=str(tmp_path))).tokenizer.name == tmp_path.name


def test_the_gpus_model_where_it_fits():
    GiB = 2**30
    name, why = choose_model(40 * GiB, 130 * GiB, "NVIDIA H200")
    assert name == "internlm2-1.8b"
    assert why == "the 40.0 GiB that internlm2-1.8b needs fit the 130.0 GiB of NVIDIA H200"
    name, why = choose_model(40 * GiB, 15 * GiB, "T4")
    assert name == "nano" and "do not fit the 15.0 GiB of T4" in why
