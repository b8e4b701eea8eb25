"""Values of --model and --tokenizer: a run, a config.json, a directory of weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from models import generate as command
from models import load
from models.config import PRESETS
from tests.train.runs import params
from train.config.config import Config
from train.run import build
from train.run.build import abstract_training, initial_params
from train.run.inputs import read_model
from train.run.resolve import resolve

DATA = Path(__file__).parents[2] / "data"


@pytest.mark.parametrize("part", ["", "checkpoints/8"])
def test_a_run_begins_from_the_weights_of_a_run(part, finished, tiny):
    """With the tokenizer of that run, and a directory and a learning rate of its own."""
    run = resolve(Config(model=str(finished / part), seq_len=64))
    assert (run.model, run.weights, run.tokenizer.name) == (
        *(tiny, finished / "checkpoints" / "8"),
        "byte",
    )
    assert str(run.out).startswith("runs/finished-64-") and run.lr == 2e-5
    chosen = run.chosen()
    assert (chosen["model"], chosen["tokenizer"]) == (str(run.weights), "byte")
    if not part:
        _, _, like = abstract_training(run)
        begun = jax.tree.map(np.asarray, initial_params(run, like))
        jax.tree.map(np.testing.assert_array_equal, begun, params(finished, 8))


def test_a_run_speaks(finished, capsys):
    """Without conversion, with its own tokenizer; another one is refused."""
    argv = [str(finished), "--prompt=a", "--max_new_tokens=4", "--dtype=float32"]
    assert command.main(argv) == 0
    assert capsys.readouterr().out
    assert command.main([*argv, f"--tokenizer={DATA / 'tokenizer_tiny'}"]) == 1
    said = capsys.readouterr().err
    assert "is not the one that" in said and "which was byte" in said


def test_a_config_json_is_a_model_of_an_own_size(tiny, tmp_path):
    """Random weights; the tokenizer beside it is its own."""
    (tmp_path / "own").mkdir()
    file = tmp_path / "own" / "config.json"
    file.write_text(json.dumps(tiny.to_hf()))
    run = resolve(Config(model=str(file)))
    assert (run.model, run.weights, run.tokenizer.name) == (tiny, None, "byte")
    assert str(run.out) == "runs/own-512" and run.lr == 3e-4
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / "tokenizer_tiny" / name, tmp_path / "own")
    large = dataclasses.replace(tiny, vocab_size=100_000)
    file.write_text(json.dumps(large.to_hf()))
    assert resolve(Config(model=str(file))).tokenizer.name == "own"


def test_nano_has_the_vocabulary_of_its_tokenizer():
    run = resolve(Config(model="nano", tokenizer=str(DATA / "tokenizer_tiny_spm")))
    size = run.tokenizer.vocab_size
    assert size <= run.model.vocab_size < size + 64 and run.model.vocab_size % 64 == 0
    assert dataclasses.replace(run.model, vocab_size=320) == PRESETS["nano"]
    assert resolve(Config(model="nano")).model == PRESETS["nano"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("internlm/internlm2-7b", "hf download internlm/internlm2-7b --local-dir internlm/"),
        ("nowhere", "is no preset .* and no directory$"),
        (".", "and a directory without config.json"),
    ],
)
def test_what_is_no_model(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_model(name)


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="contains a LoRA adapter .* --lora.adapter="):
        read_model(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value, finished, monkeypatch):
    """Before the first step: a smaller learning rate would not help."""
    run = resolve(Config(model=str(finished), seq_len=64))
    _, _, like = abstract_training(run)
    loaded = load(run.weights, execution=run.execution, mesh=run.real_mesh)
    loaded.norm_D[...] *= value
    monkeypatch.setattr(build, "load", lambda *_, **__: loaded)
    with pytest.raises(ValueError, match="checkpoints/8 holds NaN or infinite weights"):
        initial_params(run, like)
