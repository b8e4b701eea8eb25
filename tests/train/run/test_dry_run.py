"""A dry run prints a command, the plan and the compiler's count, and leaves no trace."""

import dataclasses
import re
import shlex

import pytest

from models.cli import parse
from train.config.config import Config
from train.main import main
from train.run.repeat import as_command
from train.run.resolve import resolve


def pasted(out: str) -> Config:
    """Read back the command that a dry run printed."""
    command, _, _ = out.partition("\n\n")
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "train.main"]
    return parse(Config, words[3:], "train.main")


def test_prints_a_command_the_plan_and_the_compilers_count(tiny, capsys, tmp_path):
    out = tmp_path / "out"
    argv = ["--dry_run", "--model=tiny", "--seq_len=64", "--batch_size=8", f"--out={out}"]
    argv += ["--mesh.seq=2"]
    assert main([*argv, "--no_resume", "--data.strict", "--optim.betas", "0.8", "0.9"]) == 0
    said = capsys.readouterr().out
    assert "data 1 x fsdp 4 x seq 2 x tensor 1" in said and "it fits" in said
    [(xla, plan, percent)] = re.findall(r"XLA, .*: (\S+) GiB .*; the plan (\S+) GiB, (\S+)%", said)
    assert not out.exists()
    config = pasted(said)
    assert (config.resume, config.data.strict, config.optim.betas) == (False, True, (0.8, 0.9))
    assert (config.attn, config.remat, config.scan_layers) == ("xla", "dots", True)
    assert (config.mesh.fsdp, config.mesh.seq, config.optim.lr) == (4, 2, 3e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "a b.txt", "c.txt:2", "--epochs=2"],
        ["--optim.name=adafactor", "--optim.schedule=constant"],
        ["--optim.schedule=wsd", "--scan_layers=False", "--log", "wandb"],
    ],
)
def test_the_printed_command_is_the_same_run(flags, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("a b.txt", "c.txt"):
        (tmp_path / file).write_text("text")
    run = resolve(parse(Config, ["--model=tiny", *flags], "train.main"))
    again = resolve(pasted(as_command(run)))
    for field in dataclasses.fields(run):
        if field.name not in ("config", "notes", "attn_reason", "tokenizer"):
            assert getattr(again, field.name) == getattr(run, field.name), field.name


def test_what_does_not_fit_is_not_compiled(capsys):
    """Status 1, which a script can see."""
    assert main(["--dry_run", "--model=internlm2-20b", "--seq_len=2048"]) == 1
    said = capsys.readouterr().out
    assert "it does not fit: " in said and "XLA" not in said


@pytest.mark.parametrize("seq_len", [512, 32768])
def test_lines_of_the_plan_add_up_to_its_total(seq_len, capsys):
    argv = ["--dry_run", "--dry_run_device=h200", "--model=internlm2-7b", f"--seq_len={seq_len}"]
    main([*argv, "--batch_size=1", "--grad_accum=1"])
    lines = re.findall(r"^  (\w+) +(\d+\.\d\d) ", capsys.readouterr().out, re.M)
    sizes = {name: float(size) for name, size in lines}
    total = sizes.pop("total")
    assert sum(sizes.values()) == pytest.approx(total, abs=0.005 * len(sizes) + 0.005)


def test_a_gpu_that_is_not_here(capsys):
    """7B at 32k on one H200, and 20B on eight."""
    seven = ["--model=internlm2-7b", "--seq_len=32768", "--remat=qkv"]
    assert main(["--dry_run", "--dry_run_device=h200", *seven]) == 1
    said = capsys.readouterr().out
    assert "on 1 NVIDIA H200" in said and "attention pallas" in said
    assert "of 129.17 GiB" in said and "take --remat=attention" in said
    eight = ["--model=internlm2-20b", "--seq_len=32768", "--mesh.fsdp=8"]
    assert main(["--dry_run", "--dry_run_device=h200", *eight]) == 0
    said = capsys.readouterr().out
    assert "on 8 NVIDIA H200" in said and "it fits" in said


def test_cudnn_can_be_planned(capsys):
    """It has no document mask: its rows are assumed to hold one document each."""
    argv = ["--dry_run", "--dry_run_device=h200", "--model=internlm2-1.8b", "--seq_len=4096"]
    assert main([*argv, "--attn=cudnn"]) == 0
    assert "attention cudnn" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", ["a100-80", "a100-40", "l40s", "rtx4090", "rtx3090", "rtx5090"])
def test_gpus_without_wgmma_name_their_kernels(gpu, capsys):
    argv = ["--dry_run", f"--dry_run_device={gpu}", "--model=internlm2-1.8b", "--seq_len=4096"]
    assert main([*argv, "--lora.rank=8", "--base_dtype=nf4"]) == 0
    assert "attention pallas_mma" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (
            ["--dry_run", "--dry_run_device=b9"],
            1,
            "--dry_run_device=b9 must be one of h200, h100, a100-80, a100-40, l40s",
        ),
        (["--dry_run_device=h200"], 2, "--dry_run_device=h200 describes a GPU for --dry_run"),
        (
            ["--dry_run", "--dry_run_device=80", "--attn=palas"],
            2,
            "--attn=palas must be one of",
        ),
        *(
            (["--dry_run", "--dry_run_device=h200", "--model=internlm2-1.8b", *flags], 1, message)
            for flags, message in {
                ("--seq_len=131072",): "beyond the 65,536 positions of the model",
                ("--mesh.tensor=3",): "must be a multiple of 3 = mesh axes tensor",
                ("--attn=cudnn", "--deterministic"): "deterministic",
                ("--attn=pallas", "--dtype=float32"): "bfloat16 and float16, not float32",
                ("--tokenizer=nowhere",): "tokenizer nowhere does not exist",
            }.items()
        ),
        (
            ["--dry_run", "--dry_run_device=a100-80", "--attn=pallas", "--dtype=float32"],
            1,
            "'pallas_mma' cannot run: it takes bfloat16 and float16, not float32",
        ),
        (["--dry_run", "--dry_run_device=inf"], 1, "--dry_run_device=inf must be one of"),
        (["--dry_run", "--dry_run_device=nan"], 1, "--dry_run_device=nan must be one of"),
        (["--dry_run", "--remat=bogus"], 2, "--remat=bogus must be one of"),
    ],
)
def test_wrong_flags(flags, status, message, capsys):
    assert main(flags) == status
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
