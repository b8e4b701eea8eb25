"""Defaults of flags that are not given, and refusals before any work."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxattn.device import GPUS
from models.config import PRESETS
from train.config.config import Config
from train.config.sections import DataConfig, LoRAConfig, MeshConfig, OptimConfig
from train.run.resolve import choose_model, default_out, resolve

DATA = Path(__file__).parents[2] / "data"


def test_cpu_defaults():
    run = resolve(Config())
    assert run.name == "nano" and run.model == PRESETS["nano"]
    assert run.execution.dtype == jnp.dtype("float32") and run.execution.attn == "xla"
    assert run.rows * 512 == 4096  # 2,048 tokens would leave devices without a row
    assert str(run.out) == "runs/nano-512" and run.lr == 2e-3
    assert run.tokenizer.name == "byte"
    assert any("no GPU" in note for note in run.notes)


def test_flags_win(tiny):
    run = resolve(
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
    assert run.notes == () and run.model is PRESETS["tiny"]
    assert (run.rows, run.execution.attn, run.lr, str(run.out)) == (16, "xla", 1.0, "here")
    assert run.execution.dtype == jnp.dtype("bfloat16")
    assert (run.execution.remat, run.execution.scan) == ("qkv", False)
    assert dict(run.mesh.shape) == {"data": 2, "fsdp": 4, "seq": 1, "tensor": 1}


def test_prompts_without_samples_are_said(tiny):
    """--sample_every is 0 by default."""
    note = "no samples of --prompts during training: --sample_every is 0"
    assert note in resolve(Config(model="tiny", prompts=("a",))).notes
    assert note not in resolve(Config(model="tiny", prompts=("a",), sample_every=2)).notes
    note = "no samples during training: --chat is for --prompts, and there are none"
    assert note in resolve(Config(model="tiny", chat=True)).notes
    assert note not in resolve(Config(model="tiny", chat=True, prompts=("a",))).notes


def test_remat_is_chosen_and_said(tiny):
    run = resolve(Config(model="tiny"))
    assert run.execution.remat == "dots" and "remat dots: the fastest that fits" in run.notes[-1]
    assert run.execution.scan  # on a CPU


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_an_execution_option(deterministic, tiny):
    run = resolve(Config(model="tiny", deterministic=deterministic))
    assert run.execution.deterministic is deterministic


def test_deterministic_cudnn_is_refused():
    """Before a run starts: the model is not made, nothing is written."""
    config = Config(model="internlm2-1.8b", attn="cudnn")
    assert resolve(config, GPUS["h200"]).execution.attn == "cudnn"
    with pytest.raises(NotImplementedError, match="deterministic"):
        resolve(dataclasses.replace(config, deterministic=True), GPUS["h200"])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"model": "nono"}, ValueError, "--model=nono is no preset .nano, .* and no directory"),
        ({"model": "tests"}, ValueError, "--model=tests .* a directory without config.json"),
        ({"attn": "pallas"}, NotImplementedError, "'pallas' cannot run.*Hopper.*use --attn=xla"),
        ({"batch_size": 6}, ValueError, "--batch_size=6 must be a multiple of 8"),
        ({"tokenizer": "nowhere"}, OSError, "nowhere does not exist"),
        (
            {"attn": "eager", "seq_len": 32768, "batch_size": 64},
            NotImplementedError,
            "score matrix of 32768 x 32768 tokens would need .* GiB",
        ),
    ],
)
def test_refusals(kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        resolve(Config(**kwargs))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gpu", ["a100-80", "rtx3090"])
def test_fp8_is_refused_where_the_gpu_has_none(gpu):
    config = Config(model="internlm2-1.8b", attn="xla", seq_len=512, matmul="fp8")
    with pytest.raises(
        NotImplementedError, match="needs .* 8.9 or higher, .* has 8.[06]: take"
    ) as why:
        resolve(config, GPUS[gpu])
    assert "\n" not in str(why.value)
    assert resolve(dataclasses.replace(config, matmul="bf16"), GPUS[gpu])


@pytest.mark.parametrize("gpu", ["l40s", "h100", "h200", "rtx5090"])
def test_fp8_is_an_execution_option(gpu):
    config = Config(model="internlm2-1.8b", attn="xla", seq_len=512, matmul="fp8")
    assert resolve(config, GPUS[gpu]).execution.matmul == "fp8"


def test_long_rows_are_checked_against_the_host():
    """Policies are mixed for device and host; a remat that is given must fit both.

    It is refused before anything is compiled, on one line with value, bound and remedy.
    """
    h200 = dataclasses.replace(GPUS["h200"], memory_fraction=0.92)
    optim = OptimConfig(moment_dtype="int8")
    config = Config(model="internlm2-7b", seq_len=262_144, rope_factor=8.0, param_dtype="bf16")
    config = dataclasses.replace(config, batch_size=1, optim=optim)
    run = resolve(config, h200)
    assert run.execution.remat == "offload,offload,offload,attention"
    assert run.execution.tile_size == 16_384 and run.execution.scan
    run.check_memory()
    small = dataclasses.replace(h200, host_memory=64.0)
    run = resolve(dataclasses.replace(config, remat="offload_input"), small)
    with pytest.raises(
        ValueError, match="on the host 64.00;.*51.20 GiB of the host: take --remat="
    ) as why:
        run.check_memory()
    assert "\n" not in str(why.value)
    with pytest.raises(ValueError, match="tile_size=16384 does not divide a row of 262,147 tokens"):
        odd = dataclasses.replace(config, seq_len=262_147, tile_size=16_384, rope_factor=9.0)
        resolve(odd, h200)


def test_offload_needs_pinned_memory(tiny, monkeypatch):
    monkeypatch.setattr("train.run.resolve._memories", lambda _: {"device"})
    with pytest.raises(NotImplementedError, match="needs pinned host memory.*take --remat=full"):
        resolve(Config(model="tiny", remat="offload"))


@pytest.mark.parametrize("kind", ["tokenizer_tiny", "tokenizer_tiny_spm"])
def test_trained_weights_bring_their_tokenizer(kind, tiny, tmp_path):
    """Of either kind; where they have none, nobody guesses."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_hf() | {"vocab_size": 2000}))
    with pytest.raises(ValueError, match="nor tokenizer.model: name one with --tokenizer"):
        resolve(Config(model=str(tmp_path)))
    assert resolve(Config(model=str(tmp_path), tokenizer="byte")).tokenizer.name == "byte"
    shutil.copytree(DATA / kind, tmp_path, dirs_exist_ok=True)
    assert resolve(Config(model=str(tmp_path))).tokenizer.name == tmp_path.name


def test_the_gpus_model_where_it_fits():
    GiB = 2**30
    name, why = choose_model(40 * GiB, 130 * GiB, "NVIDIA H200")
    assert name == "internlm2-1.8b"
    assert why == "the 40.0 GiB that internlm2-1.8b needs fit the 130.0 GiB of NVIDIA H200"
    name, why = choose_model(40 * GiB, 15 * GiB, "T4")
    assert name == "nano" and "do not fit the 15.0 GiB of T4" in why


def test_default_out_belongs_to_model_data_and_tokenizer(tmp_path):
    """Two commands that train on other data, or weights of one name, never share a directory."""

    def out(data=None, weights=None, tokenizer=None, seq_len=64) -> str:
        files = None if data is None else tuple(map(str, data))
        config = Config(seq_len=seq_len, tokenizer=tokenizer, data=DataConfig(files=files))
        return default_out(config, "nano", weights)

    a, b = tmp_path / "a" / "chats.jsonl", tmp_path / "b" / "chats.jsonl"
    assert out() == "runs/nano-64" and out(seq_len=128) == "runs/nano-128"
    assert out([a]).startswith("runs/nano-chats-64-")
    different = [
        *(out(), out([a]), out([b]), out([a, b]), out([f"{a}:2"]), out(tokenizer="x")),
        *(out(weights=tmp_path / "a" / "hf"), out(weights=tmp_path / "b" / "hf")),
    ]
    assert len(set(different)) == len(different)
    assert out([a]) == out([a])


def test_a_gpu_that_is_not_here_is_resolved_as_one_that_is():
    """The dry run for a GPU makes the same choices: no second way."""
    config = Config(model="internlm2-7b", seq_len=32768, mesh=MeshConfig(fsdp=8))
    run = resolve(config, dataclasses.replace(GPUS["h200"], memory_fraction=0.92))
    assert run.execution.attn == "pallas" and run.attn_reason == "auto: a Hopper GPU"
    assert (run.rows, run.execution.scan, run.execution.dtype) == (8, False, jnp.bfloat16)
    assert run.memory_advice is None and "remat dots,dots,dots,attention" in run.notes[-1]
    a100 = resolve(config, GPUS["a100-80"])
    assert a100.execution.attn == "pallas_mma" and a100.attn_reason.startswith("auto: ")


def test_a_long_row_over_several_gpus(tiny):
    """More devices than kv heads; the record has the axis, and rows do not depend on it."""
    config = Config(model="internlm2-7b", seq_len=65536, mesh=MeshConfig(seq=16))
    run = resolve(config, GPUS["h200"])
    assert run.notes[0] == (
        "mesh.seq 16: a device has 4,096 of the 65,536 tokens of a row; all-to-alls exchange them "
        "for 2 of the 32 heads around attention, each kv head repeated 2 times"
    )
    assert (run.rows, run.chosen()["mesh.seq"]) == (1, 16)
    with pytest.raises(ValueError, match="--mesh.seq=8 must divide 4 query heads, .*: take 1 or"):
        resolve(Config(model="tiny", mesh=MeshConfig(seq=8)))


def test_choices_are_said_where_a_flag_is_open():
    run = resolve(Config(attn="sdpa"))
    assert (run.execution.attn, run.attn_reason) == ("xla", "asked for as sdpa")


def test_memory_is_checked_by_the_run_alone():
    run = resolve(Config(model="internlm2-20b"))
    with pytest.raises(ValueError, match="the run needs about .* GiB per device"):
        run.check_memory()


def test_a_mix_of_policies_divides_the_layers_of_a_loop():
    with pytest.raises(ValueError, match="--remat=full,full,dots has 3 policies, .* the 4 layers"):
        resolve(Config(model="nano", remat="full,full,dots", scan_layers=True))


def test_an_adapter_needs_its_base_model():
    with pytest.raises(ValueError, match="--lora.adapter=here needs --model, the base model"):
        resolve(Config(lora=LoRAConfig(adapter="here")))


def test_long_rows_in_short_parts_may_recompute_all():
    """7B over four small GPUs: parts of 16,384 tokens need no tiles, and "full" fits."""
    optim = OptimConfig(moment_dtype="int8")
    config = Config(
        model="internlm2-7b", seq_len=65536, mesh=MeshConfig(seq=4), param_dtype="bf16", optim=optim
    )
    run = resolve(config, GPUS["rtx4090"])
    assert run.memory_advice is None and run.execution.tile_size is None
