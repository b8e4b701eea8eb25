"""User errors: one line on stderr, an exit status, and no partial output."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest

from models.config import PRESETS
from tests.train.runs import losses
from train.main import main


@pytest.fixture
def refused(capsys, tmp_path, tiny):
    """Run the command line, which must fail, and return its one line."""

    def run(*argv: str, status: int = 1, out=None) -> str:
        directory = tmp_path / "out" if out is None else out
        assert main([f"--out={directory}", *argv]) == status
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and said.err.startswith("error: ")
        assert "Traceback" not in said.err + said.out
        if out is None:
            assert not directory.exists()
        return said.err

    return run


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seq_lne=3", "unknown argument --seq_lne; the nearest is --seq_len"),
        ("--seq_len=1", "--seq_len=1 must be at least 2"),
        ("--rope_factor=0.5", "--rope_factor=0.5 must be at least 1"),
        ("--guard.spike=1", "--guard.spike=1.0 must be above 1"),
        ("--guard.patience=0", "--guard.patience=0 must be at least 1"),
        ("--save_minutes=0", "--save_minutes=0.0 must be above 0"),
        ("--data.stall_minutes=0", "--data.stall_minutes=0.0 must be above 0"),
        ("--z_loss=-1", "--z_loss=-1.0 must be at least 0"),
        ("--dist.processes=2", "--dist.coordinator, --dist.processes and --dist.id go together"),
        ("--dtype=int8", "--dtype=int8 must be one of bfloat16, float32"),
        ("--attn=palas", "--attn=palas must be one of auto, cudnn"),
    ],
)
def test_wrong_flag_is_status_2(refused, flag, message):
    assert message in refused(flag, status=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attn=pallas"], "its kernels are for Ampere, Ada, Hopper"),
        (["--attn=eager", "--seq_len=32768", "--batch_size=64"], "GiB a layer, this device has"),
        (["--model=internlm2-3b"], "is no preset (nano, internlm2-1.8b"),
        (["--model=internlm2-20b", "--batch_size=64"], "the run needs about"),
        (["--mesh.tensor=3"], "must be the number of devices, 8"),
        (["--mesh.tensor=8", "--model=tiny"], "must be a multiple of 8"),
        (["--model=tiny", "--seq_len=40000"], "--seq_len=40000 is beyond the 32,768 positions"),
        (["--model=tiny", "--seq_len=40000"], "--rope_factor=2 extends it"),
        (["--model=nano", "--seq_len=99999"], "dynamic scaling by 2): --rope_factor=4 extends it"),
        (["--batch_size=3"], "--batch_size=3 must be a multiple of 8"),
        (["--tokenizer=nowhere"], "nowhere does not exist"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_run(refused, flags, message):
    assert message in refused(*flags)


def test_empty_data_file(refused, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl" in refused("--data", str(tmp_path / "empty.jsonl"))


def test_broken_row_is_fatal_when_strict_and_names_its_line(refused, tmp_path):
    rows = ['{"text": "one"}', '{"text": ', '{"text": "three"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    said = refused("--data", str(tmp_path / "rows.jsonl"), "--data.strict", "--model=tiny")
    assert "rows.jsonl:2: " in said


def test_hf_directory_without_weights(refused, tmp_path, tiny):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(tiny.to_hf()))
    assert "tokenizer.model: name one with --tokenizer" in refused(f"--model={tmp_path / 'hf'}")
    assert "safetensors" in refused(f"--model={tmp_path / 'hf'}", "--tokenizer=byte")


def test_tokenizer_beyond_the_model(refused, tiny, monkeypatch):
    monkeypatch.setitem(PRESETS, "small", dataclasses.replace(tiny, vocab_size=256))
    assert "byte has 265 tokens, more than the 256 of small" in refused("--model=small")


RUN = ["--model=tiny", "--seq_len=64", "--batch_size=8", "--steps=8", "--save_every=3"]


def test_another_models_checkpoint(refused, finished):
    before = sorted(finished.rglob("*"))
    said = refused(*RUN, "--model=nano", "--seq_len=32", out=finished)
    assert "holds a checkpoint of another run (step 8)" in said
    assert "model.hidden_size is 32 there, 256 here" in said and "seq_len is 64 there" in said
    assert "choose another --out" in said
    assert sorted(finished.rglob("*")) == before


def test_other_data_than_the_checkpoints(refused, finished, tmp_path):
    """Names flag, files and remedy, before anything is written."""
    (tmp_path / "other.txt").write_text("other words " * 100)
    before = sorted(finished.rglob("*"))
    said = refused(*RUN, "--data", str(tmp_path / "other.txt"), out=finished)
    assert f"--data: {finished} was trained on the built-in text, now it is {tmp_path}" in said
    assert "other.txt: choose another --out" in said
    assert sorted(finished.rglob("*")) == before


def test_no_resume_never_overwrites(refused, finished):
    assert "--no_resume would overwrite it" in refused(*RUN, "--no_resume", out=finished)


def test_fewer_steps_than_done(refused, finished):
    assert "is at step 8, beyond --steps=4" in refused(*RUN, "--steps=4", out=finished)


def test_out_below_a_file(refused, tmp_path):
    (tmp_path / "file").touch()
    said = refused("--model=tiny", out=tmp_path / "file" / "out")
    assert f"{tmp_path / 'file'} is a file" in said


def test_out_of_something_else(refused, tmp_path, tiny):
    """An HF directory, say: its config.json is not ours to replace."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    said = refused("--model=tiny", out=tmp_path / "hf")
    assert "hf holds files that are not of a run (config.json): choose another --out" in said
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["config.json"]


def test_out_without_permission(refused, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert "no permission to write" in refused("--model=tiny")


def test_full_disk(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    assert "No space left on device: a checkpoint needs" in refused("--model=tiny")


def test_ctrl_c_while_the_step_compiles(refused, monkeypatch):
    """Before training there is nothing to save: one line, and the shell's status for it."""

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.run.loop.compile_training", interrupted)
    assert "stopped by Ctrl-C; the same command begins" in refused("--model=nano", status=130)


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="is no preset"):
        main(["--model=nono", f"--out={tmp_path}", "--traceback"])


class Full(io.StringIO):
    """A console on a full disk."""

    def write(self, text=""):
        raise OSError(28, "No space left on device")

    flush = write


def test_a_full_console_does_not_end_the_run(tiny, finished, tmp_path):
    """Neither stdout nor stderr can be written: the run trains, saves, and has status 0."""
    out = tmp_path / "out"
    with contextlib.redirect_stdout(Full()), contextlib.redirect_stderr(Full()):
        assert main([*RUN, "--attn=sdpa", "--optim.lr=1e-2", f"--out={out}"]) == 0
    assert losses(out) == losses(finished)


def test_out_of_memory_is_one_line(refused, monkeypatch):
    """XLA's message has a page of buffers behind its first line."""

    def full(*_):
        page = "RESOURCE_EXHAUSTED: Out of memory\nLargest buffers:\n  1. 8 GiB\n  2. 8 GiB"
        raise jax.errors.JaxRuntimeError(page)

    monkeypatch.setattr("train.run.loop.compile_training", full)
    said = refused("--model=tiny")
    assert "out of memory; a larger --grad_accum, --remat=full or a shorter --seq_len" in said
    assert "(RESOURCE_EXHAUSTED: Out of memory)" in said and "buffers" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "nowhere.txt: No such file"),
        (b"", "has no line of text"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_prompts_are_read_before_anything_is_written(text, message, refused, tmp_path):
    file = tmp_path / "nowhere.txt"
    if text is not None:
        file.write_bytes(text)
    said = refused("--model=tiny", "--sample_every=5", "--prompts", str(file))
    assert message in said


def test_a_platform_that_is_not_here_is_one_line():
    command = [sys.executable, "-m", "train.main", "--model=nano"]
    env = os.environ | {"JAX_PLATFORMS": "tpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: jax finds no device for JAX_PLATFORMS=tpu: unset it" in done.stderr
