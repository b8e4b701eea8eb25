"""Flags become a config, and a wrong flag becomes one line."""

import itertools
import re
import typing

import pytest

import jaxattn
from jaxattn.api import Impl
from models.cli import flags, parse
from models.remat import REMAT
from train.config.config import Config
from train.config.synonyms import SYNONYMS


def parsed(*argv: str) -> Config:
    return parse(Config, argv, "train.main", synonyms=SYNONYMS)


def test_no_flags_are_the_defaults():
    assert parsed() == Config()


def test_flags_as_people_type_them():
    config = parsed(
        *("--attn=pallas", "--seq_len", "32768", "--data", "a.txt", "b.jsonl", "--data.strict"),
        *("--optim.lr=1e-4", "--optim.betas", "0.9", "0.99", "--no_resume", "--mesh.fsdp=4"),
    )
    assert (config.attn, config.seq_len, config.resume) == ("pallas", 32768, False)
    assert config.data.files == ("a.txt", "b.jsonl") and config.data.strict
    assert (config.optim.lr, config.optim.betas, config.mesh.fsdp) == (1e-4, (0.9, 0.99), 4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seq_lne=3"], "unknown argument --seq_lne; the nearest is --seq_len; see --help"),
        (["--optim.learning_rate", "3"], "unknown argument --optim.learning_rate: take --optim.lr"),
        (["--xyzzy"], "unknown argument --xyzzy; see --help"),
        (["stray"], "unknown argument stray"),
        (["--seq_len=1"], "^--seq_len=1 must be at least 2"),
        (["--data.val=2"], "^--data.val=2 must be a share in"),
        (["--out="], "^--out= is empty: give a value, or leave the flag out$"),
        (["--tokenizer", ""], "^--tokenizer= is empty"),
        (["--data", "a.jsonl", ""], "^--data= is empty"),
        (["--data.val="], "^--data.val= is empty"),
        (["--data.cache="], "^--data.cache= is empty"),
        (["--lora.adapter="], "^--lora.adapter= is empty"),
        (["--data"], "^--data names no file: name some, or leave it out"),
        (["--data", "--seq_len=64"], "^--data names no file: name some, or leave it out"),
        (["--data.val"], "^--data.val names neither files nor a share"),
        (["--seq_len=many"], "^--seq_len=many must be INT$"),
        (["--z_loss=much"], "^--z_loss=much must be FLOAT$"),
        (["--optim.lr=abc"], "^--optim.lr=abc must be FLOAT$"),
        (["--optim.betas", "a", "b"], "^--optim.betas=a b must be FLOAT FLOAT$"),
        (["--mesh.fsdp=1.5"], "^--mesh.fsdp=1.5 must be INT$"),
        (["--dtype=float16"], "^--dtype=float16 must be one of bfloat16, float32$"),
        (["--attn=palas"], "^--attn=palas must be one of auto, cudnn, eager, flash_attention_2"),
        (
            ["--remat=some"],
            "^--remat=some must be one of none, dots, qkv, attention, full, offload, ",
        ),
        (["--remat=full,some"], "^--remat=some must be one of none"),
        (["--tile_size=0"], "^--tile_size=0 must be at least 1"),
        (
            ["--remat=dots", "--tile_size=64"],
            "^--remat=dots would save what --tile_size=64 recomputes: .* take one of qkv, ",
        ),
        (["--model"], "Missing value for argument '--model'"),
    ],
)
def test_mistakes(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        parsed(*argv)
    assert "\n" not in str(error.value) and "│" not in str(error.value)


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [flag for flag in flags(Config) if flag not in text] == []
    assert {"--data", "--data.strict", "--optim.lr", "--mesh.fsdp"} <= set(flags(Config))


def test_help_fits_80_columns_without_breaks_inside_sentences(monkeypatch, capsys):
    """A line ends where the next word would not fit, not where the source code has a line break."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parsed("--help")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    texts = [line.strip("│").rstrip() for line in lines if line.startswith("│")]
    columns = [re.match(r" +(?:-\S.*?  +)?", text) for text in texts]
    indented = [t for t, c in zip(texts, columns, strict=True) if c and c.end() > 20]
    for line, following in itertools.pairwise(indented):
        if line.lstrip()[0].isalpha() and not line.endswith((".", ")")):
            assert len(line) + 1 + len(following.split()[0]) > 76, line


def test_choices_are_those_of_the_code():
    """--attn is a Literal, so that parsing checks it and --help lists it; --help lists --remat."""
    assert {*typing.get_args(Impl)} == {"auto", *jaxattn.IMPLEMENTATIONS, *jaxattn.ALIASES}
    metavar = Config.__annotations__["remat"].__metadata__[0].metavar
    assert metavar == "{" + ",".join(REMAT) + "}[,...]"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--lr", "--optim.lr"),
        ("--learning_rate", "--optim.lr"),
        ("--learning-rate", "--optim.lr"),
        ("--output_dir", "--out"),
        ("--warmup_ratio", "--optim.warmup_ratio"),
        ("--grad_clip", "--optim.clip"),
        ("--max_norm", "--optim.clip"),
        ("--gradient_checkpointing", "--remat"),
        ("--lora_rank", "take --lora.rank"),
        ("--per_device_train_batch_size", "--batch_size"),
        ("--gradient_accumulation_steps", "--grad_accum"),
        ("--accumulative_counts", "--grad_accum"),
        ("--bf16", "--dtype=bfloat16"),
        ("--num_train_epochs", "--epochs"),
        ("--save_steps", "--save_every"),
        ("--cutoff_len", "--seq_len"),
        ("--max_length", "--seq_len"),
        ("--model_name_or_path", "--model"),
        ("--training.seq_len", "--seq_len"),
        ("--deepspeed", "--mesh.fsdp"),
        ("--context_parallel_size", "--mesh.seq"),
        ("--dataset_dir", "--data"),
        ("--nproc_per_node", "--dist.processes"),
        ("--wd", "--optim.weight_decay"),
        ("--impl", "--attn"),
    ],
)
def test_flags_of_other_trainers_name_ours(theirs, ours):
    with pytest.raises(ValueError, match=f"unknown argument {theirs}: .*{ours}(\\W|$)"):
        parsed(f"{theirs}=1")


def test_hints_name_flags_that_exist():
    known = {*flags(Config)}
    for name, hint in SYNONYMS.items():
        for flag in re.findall(r"--[a-z_.]+", hint):
            assert flag.rstrip(".") in known, (name, flag)
        assert f"--{name}" not in known, name
