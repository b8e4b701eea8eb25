"""A run starts, resumes or is refused: nothing begins anew, or goes on as another, in silence."""

import dataclasses
import json
import re
import shutil

import pytest

from tests.train.runs import losses
from train.config.config import Config
from train.config.sections import GuardConfig, OptimConfig
from train.main import main
from train.run import loop, resume
from train.run.loop import run
from train.run.resume import fingerprint_weights

RUN = ["--model=tiny", "--attn=sdpa", "--seq_len=64", "--batch_size=8", "--save_every=3"]


@pytest.fixture
def copy(finished, tmp_path):
    """Copy the directory of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_without_a_readable_checkpoint_is_never_begun_anew(copy, capsys):
    """Also not by the second start, which finds the damaged checkpoints moved aside."""
    for metadata in copy.glob("checkpoints/*/run/metadata/metadata"):
        metadata.write_text("{")
    for metadata in copy.glob("checkpoints/*/run/metadata"):
        if metadata.is_file():
            metadata.write_text("{")
    before = losses(copy)
    argv = [*RUN, "--steps=9", "--optim.lr=1e-2", f"--out={copy}"]
    for _ in range(2):
        assert main(argv) == 1
        assert "choose another --out" in capsys.readouterr().err
    assert losses(copy) == before
    assert main([*argv, "--no_resume", "--steps=1"]) == 0  # asked for
    assert len(losses(copy)) == 1


def test_a_run_that_trained_meanwhile_is_seen_once_the_lock_is_held(tiny_run, tmp_path, finished):
    """The first start was stopped (SIGSTOP) while another one trained to its end."""
    out = tmp_path / "out"
    compile_training = loop.compile_training

    def other_run_first(*args):
        shutil.copytree(finished, out)
        return compile_training(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_training", other_run_first)
        with pytest.raises(ValueError, match="another run has trained in .* to step 8 since this"):
            run(tiny_run(out))
    assert losses(out) == losses(finished)


def test_changed_flags_are_logged_with_both_values(tiny_run, copy, capsys):
    config = dataclasses.replace(
        tiny_run(copy), steps=9, batch_size=16, optim=OptimConfig(lr=2e-3, schedule="linear")
    )
    run(config)
    said = capsys.readouterr().out
    assert "--batch_size is 16 from here on, was 8 until step 8" in said
    assert "--optim.lr is 0.002 from here on, was 0.01 until step 8" in said
    assert "--optim.schedule is linear from here on, was cosine until step 8" in said
    assert "--steps is 9 from here on, was 8 until step 8" in said
    assert said.count("from here on") == 4


def test_the_same_flags_log_no_change(tiny_run, copy, capsys):
    run(dataclasses.replace(tiny_run(copy), keep_last=3, guard=GuardConfig()))
    assert "from here on" not in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, -1], ids=["first byte", "last byte"])
def test_fingerprint_of_weights(at, tmp_path):
    """Two fine-tunes of one model have files of the same names and sizes."""
    (tmp_path / "model.safetensors").write_bytes(b"w" * 3_000_000)
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint_weights(tmp_path)
    (tmp_path / "config.json").write_text('{"edited": 1}')
    assert fingerprint_weights(tmp_path) == before
    changed = bytearray(b"w" * 3_000_000)
    changed[at] = 0
    (tmp_path / "model.safetensors").write_bytes(changed)
    assert fingerprint_weights(tmp_path) != before


def test_other_weights_are_refused(tiny_run, copy, monkeypatch, capsys):
    """The identity of a run has the fingerprint of the weights that it began from."""
    identity_of = resume.identity_of
    monkeypatch.setattr(loop, "identity_of", lambda r: identity_of(r) | {"weights": "b" * 16})
    with pytest.raises(ValueError, match="weights is none there, bbbb.* here; choose another"):
        run(tiny_run(copy))


def test_model_run_that_has_trained_on_is_named(tiny_run, copy, tmp_path, monkeypatch):
    """The checkpoint that the second run began from is the remedy, as long as it is there."""
    second = dataclasses.replace(tiny_run(tmp_path / "second"), model=str(copy), steps=1)
    run(second)
    shutil.copytree(copy / "checkpoints" / "6", copy / "checkpoints" / "9")  # as if trained on
    first, latest = copy / "checkpoints" / "8", copy / "checkpoints" / "9"
    message = f"second began from {first}, and --model={copy} means {latest}: "
    with pytest.raises(ValueError, match=re.escape(f"{message}take --model={first}")):
        run(second)
    run(dataclasses.replace(second, model=str(first), steps=2))
    assert len(losses(tmp_path / "second")) == 2
    shutil.rmtree(first)
    with pytest.raises(ValueError, match=re.escape(f"{message}choose another --out, because")):
        run(second)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size=1000000000000000000"], "tokens a step must be at most 2,147,483,647"),
        (["--attn=pallas"], "use --attn=xla, which runs everywhere"),
    ],
)
def test_what_cannot_run_is_one_line(flags, message, capsys, tmp_path):
    assert main(["--model=nano", *flags, f"--out={tmp_path / 'o'}"]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "impl=" not in said


def test_documents_packed_for_cudnn_are_refused(tiny_run, tmp_path, monkeypatch):
    """Its rows must hold one document each; a long text, split into rows, does."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "word"}) for _ in range(40)))
    resolve = loop.resolve

    def unpacked(config: Config):
        return dataclasses.replace(resolve(config), packed=False)

    monkeypatch.setattr(loop, "resolve", unpacked)
    config = tiny_run(tmp_path / "out")
    data = dataclasses.replace(config.data, files=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(ValueError, match="cudnn has no document mask, and the data pack 40 docu"):
        run(dataclasses.replace(config, data=data))
    run(config)  # the built-in text is one document
    assert len(losses(tmp_path / "out")) == 8
