"""Flags become a config, and a wrong flag becomes one line."""

import pytest

from train.config.cli import flags, parse
from train.config.config import Config


def parsed(*argv: str) -> Config:
    return parse(Config, argv, "train.main")


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
        (["--optim.learning_rate", "3"], "unknown argument --optim.learning_rate; the nearest is"),
        (["--xyzzy"], "unknown argument --xyzzy; see --help"),
        (["stray"], "unknown argument stray"),
        (["--seq_len=1"], "^--seq_len=1 must be at least 2"),
        (["--data.val=2"], "^--data.val=2 must be a share in"),
        (["--data"], "^--data names no file: name some, or leave it out"),
        (["--data", "--seq_len=64"], "^--data names no file: name some, or leave it out"),
        (["--data.val"], "^--data.val names neither files nor a share"),
        (["--seq_len=many"], "Error parsing --seq_len: .*'many'"),
        (["--dtype=float16"], "invalid choice 'float16' for argument '--dtype'"),
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
