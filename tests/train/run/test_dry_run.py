"""A dry run says what would happen and leaves no trace; the plan stands beside the compiler's."""

import re

import pytest

from train.main import main


def test_says_flags_plan_and_the_compilers_count(tiny, capsys, tmp_path):
    out = tmp_path / "out"
    argv = ["--dry_run", "--model=tiny", "--seq_len=64", "--batch_size=8", f"--out={out}"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "--optim.betas=(chosen)" in said and f"--out={out}" in said
    assert "data 1 x fsdp 8 x tensor 1" in said and "it fits" in said
    [(xla, plan, percent)] = re.findall(r"XLA, .*: (\S+) GiB .*; the plan (\S+) GiB, (\S+)%", said)
    assert not out.exists()


def test_what_does_not_fit_is_not_compiled(capsys):
    assert main(["--dry_run", "--model=internlm2-20b", "--seq_len=2048"]) == 0
    said = capsys.readouterr().out
    assert "it does not fit: " in said and "XLA" not in said


def test_a_gpu_that_is_not_here(capsys):
    """7B at 32k on one H200, and 20B on eight."""
    seven = ["--model=internlm2-7b", "--seq_len=32768", "--remat=qkv"]
    assert main(["--dry_run", "--dry_run_device=h200", *seven]) == 0
    said = capsys.readouterr().out
    assert "on 1 NVIDIA H200" in said and "attention pallas" in said
    assert "of 129.17 GiB" in said and "take --remat=attention" in said
    eight = ["--model=internlm2-20b", "--seq_len=32768", "--mesh.fsdp=8"]
    assert main(["--dry_run", "--dry_run_device=h200", *eight]) == 0
    said = capsys.readouterr().out
    assert "on 8 NVIDIA H200" in said and "it fits" in said


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
            1,
            "unknown attention implementation 'palas'; choose",
        ),
        *(
            (["--dry_run", "--dry_run_device=h200", "--model=internlm2-1.8b", *flags], 1, message)
            for flags, message in {
                ("--seq_len=131072",): "beyond the 65,536 positions of the model",
                ("--mesh.tensor=3",): "must be a multiple of 3 = mesh axes tensor",
                ("--attn=cudnn",): "no document mask",
                ("--attn=pallas", "--dtype=float32"): "bfloat16 and float16, not float32",
                ("--tokenizer=nowhere",): "tokenizer nowhere does not exist",
            }.items()
        ),
        (["--dry_run", "--dry_run_device=a100-80", "--attn=pallas"], 1, "for Hopper GPUs"),
        (["--dry_run", "--dry_run_device=inf"], 1, "--dry_run_device=inf must be one of"),
        (["--dry_run", "--dry_run_device=nan"], 1, "--dry_run_device=nan must be one of"),
        (["--dry_run", "--remat=bogus"], 2, "--remat=bogus must be one of none, dots"),
    ],
)
def test_wrong_flags(flags, status, message, capsys):
    assert main(flags) == status
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
