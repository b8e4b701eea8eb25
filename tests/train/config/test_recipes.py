"""A recipe is XTuner's numbers; every flag typed beats it; a wrong name lists the right ones."""

import json

import pytest

from train.config.command_line import parse_flags
from train.config.config import Config
from train.config.recipes import RECIPES
from train.main import main


def read(*argv):
    return parse_flags(argv)


def test_xtuners_numbers():
    long, alpaca = RECIPES["internlm2-7b-full-32k"], RECIPES["internlm2-1.8b-full-alpaca-2k"]
    assert (long.seq_len, long.epochs, long.optim.lr) == (32768, 1, 4e-5)
    assert (long.optim.rates, long.optim.weight_decay) == ((0.9, 0.95), 0.01)
    assert (long.optim.warmup_ratio, long.optim.last_ratio, long.optim.clip) == (0.025, 0.15, 1.0)
    assert (alpaca.seq_len, alpaca.epochs, alpaca.optim.lr) == (2048, 3, 2e-5)
    assert (alpaca.optim.rates, alpaca.optim.weight_decay) == ((0.9, 0.999), 0.0)
    assert (alpaca.optim.warmup_ratio, alpaca.optim.last_ratio) == (0.03, 0.0)
    assert all((c.save_every, c.keep_last) == (500, 2) for c in RECIPES.values())
    others = {n: c.sample_every for n, c in RECIPES.items() if c.sample_every != 500}
    assert others == {
        **{f"internlm2-{size}-qlora-code-2k": 100 for size in ("1.8b", "7b", "20b")},
        **{f"internlm2-{size}-full-{row}k": 0 for size in ("1.8b", "7b") for row in (128, 256)},
    }


def test_xtuners_numbers_of_qlora():
    """They are the numbers of internlm2_chat_7b_qlora_alpaca_e3 and its siblings."""
    for size in ("1.8b", "7b", "20b"):
        c = RECIPES[f"internlm2-{size}-qlora-alpaca-2k"]
        assert (c.seq_len, c.epochs, c.base_dtype) == (2048, 3, "nf4")
        assert (c.lora.rank, c.lora.alpha, c.lora.dropout) == (64, 16, 0.1)
        assert (c.optim.lr, c.optim.rates, c.optim.weight_decay) == (2e-4, (0.9, 0.999), 0.0)
        assert (c.optim.warmup_ratio, c.optim.last_ratio, c.optim.clip) == (0.03, 0.0, 1.0)
    assert RECIPES["internlm2-7b-qlora-oasst-512"].seq_len == 512


@pytest.mark.parametrize("name", [n for n in RECIPES if n.endswith(("-128k", "-256k"))])
def test_long_rows_fit_an_h200(name, capsys):
    """With dynamic rotary scaling up to the end of the row."""
    config = RECIPES[name]
    assert config.rope_factor * 32_768 == config.seq_len
    assert main(["--dry_run", "--dry_run_device=h200", f"--recipe={name}"]) == 0
    refused = capsys.readouterr().out.partition("it fits")[2]
    assert "needs --data: files to train on" in refused


@pytest.mark.parametrize(
    "form", (["--recipe=internlm2-7b-full-32k"], ["--recipe", "internlm2-7b-full-32k"])
)
def test_flags_beat_the_recipe(form):
    config = read(
        *form, "--optim.lr=1e-4", "--seq_len=4096", "--sample_every=0", "--data", "a.json"
    )
    assert config.recipe == "internlm2-7b-full-32k" and config.model == "internlm2-7b"
    assert (config.optim.lr, config.seq_len, config.sample_every) == (1e-4, 4096, 0)
    assert config.optim.betas == (0.9, 0.95) and config.data.files == ("a.json",)
    assert config.epochs == 1


def test_steps_replace_the_recipes_epochs():
    config = read("--recipe=internlm2-7b-full-32k", "--steps=30")
    assert config.steps == 30 and config.epochs is None


def test_list(capsys):
    assert main(["--recipe", "list"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == len(RECIPES) and "internlm2-20b-full-32k" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--recipe=internlm2-3b"],
            "--recipe=internlm2-3b must be one of internlm2-1.8b-full-32k,",
        ),
        (["--recipe=internlm2-7b-full-32k"], "needs --data: files to train on"),
        (["--recipe=internlm2-7b-full-32k", "--data=a.json"], "the run begins with random weights"),
        (["--optim.lr=inf"], "--optim.lr=inf must be above 0 and finite"),
        (["--optim.weight_decay=inf"], "--optim.weight_decay=inf must be at least 0 and finite"),
        (["--z_loss=inf"], "--z_loss=inf must be at least 0 and finite"),
        (["--epochs=inf"], "--epochs=inf must be above 0 and finite"),
        (["--rope_factor=inf"], "--rope_factor=inf must be at least 1 and at most 1,000,000"),
        (["--steps=9999999999"], "--steps=9999999999 must be at most 2,147,483,647"),
        (["--steps=3", "--epochs=2"], "--steps=3 and --epochs=2 contradict: leave one out"),
        (["--epochs=0"], "--epochs=0.0 must be above 0"),
        (["--optim.name=sgd"], "--optim.name=sgd must be one of "),
        (["--optim.schedule=steps"], "--optim.schedule=steps must be one of "),
        (["--seed=4294967296"], "--seed=4294967296 must be at least 0 and below 4,294,967,296"),
        (["--dist.timeout_minutes=inf"], "must be above 0 and at most 1,440, a day"),
        (["--lora_rank=8"], "take --lora.rank"),
        (
            ["--optim.name=lion", "--optim.moment_dtype=int8"],
            "--optim.moment_dtype=int8 is for adamw only",
        ),
        (["--optim.schedule=constant", "--optim.min_lr_ratio=0.1"], "leave one out"),
        (
            ["--optim.decay_ratio=0.1"],
            "--optim.decay_ratio is for wsd, not --optim.schedule=cosine",
        ),
        (["--optim.name=adafactor", "--optim.betas", "0.9", "0.99"], "is not for --optim.name=ada"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_epochs_are_steps(tiny, tmp_path, capsys, monkeypatch):
    """Half an epoch of 20 rows in steps of 8 rows is 2 steps; going on adds none."""
    monkeypatch.setattr("train.run.loop.write_sample", lambda *_: None)
    rows = [{"text": f"line {i} " * 20} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [
        "--model=tiny",
        "--seq_len=256",
        "--batch_size=8",
        "--epochs=0.5",
        f"--out={tmp_path / 'o'}",
    ]
    argv += ["--data", str(tmp_path / "rows.jsonl")]
    assert main(argv) == 0
    assert "0.5 epochs of 20 rows are 2 steps" in capsys.readouterr().out
    assert main(argv) == 0
    assert "all 2 steps are done" in capsys.readouterr().out


def test_without_flags_there_is_no_recipe():
    """The first thing that a newcomer types."""
    assert parse_flags([]) == Config()
