"""Files of --config: flags of the command line beat them, and a mistake is one line."""

import json

import pytest

from models.files import LFS_HEADER
from models.remat import REMAT
from train.config.command_line import parse_flags
from train.config.config import Config
from train.config.recipes import RECIPES
from train.main import main
from train.run.repeat import as_command, as_yaml
from train.run.resolve import resolve

YAML = """
model: no                # names, not booleans
profile: 10:12           # not a number of base 60
steps: 20
resume: off
scan_layers: yes
prompts: ["hi: there", "two\\nlines"]
data: {files: [a.txt, b.txt:2], val: 0.01}
guard: {spike: .inf}
optim.betas: [0.9, 0.95]
optim:
  lr: 1e-4               # text for YAML 1.1
  min_lr_ratio: ~
lora:
"""


def write(tmp_path, text, name="run.yaml"):
    (tmp_path / name).write_text(text)
    return f"--config={tmp_path / name}"


def test_yaml(tmp_path):
    config = parse_flags([write(tmp_path, YAML), "--seq_len=64"])
    assert (config.model, config.profile, config.steps) == ("no", "10:12", 20)
    assert (config.resume, config.scan_layers, config.seq_len) == (False, True, 64)
    assert config.prompts == ("hi: there", "two\nlines")
    assert (config.data.files, config.data.val) == (("a.txt", "b.txt:2"), ("0.01",))
    assert (config.guard.spike, config.lora.rank) == (float("inf"), None)
    assert config.optim.lr == 1e-4 and config.optim.betas == (0.9, 0.95)
    assert config.optim.min_lr_ratio is None


def test_flags_beat_the_file_and_the_file_beats_its_recipe(tmp_path):
    text = "recipe: internlm2-7b-full-32k\noptim: {lr: 1e-5}\nrows_per_device: 8\ndata: a.json"
    file = write(tmp_path, text)
    config = parse_flags([file])
    assert config.optim.lr == 1e-5 and config.optim.betas == (0.9, 0.95)
    assert (config.epochs, config.rows_per_device, config.data.files) == (1, 8, ("a.json",))
    config = parse_flags(
        [file, "--optim.lr=3e-5", "--steps=7", "--batch_size=4", "--data", "b", "c"]
    )
    assert (config.optim.lr, config.steps, config.epochs) == (3e-5, 7, None)
    assert (config.batch_size, config.rows_per_device) == (4, None)
    assert config.data.files == ("b", "c")
    config = parse_flags([file, "--recipe=internlm2-1.8b-full-alpaca-2k"])
    assert config.seq_len == RECIPES["internlm2-1.8b-full-alpaca-2k"].seq_len


MISTAKES = {
    "": "the file is empty, must have keys such as seq_len: 4096",
    "- a": "the file is a list, must have keys",
    "hello": "the file is the text 'hello', must have keys",
    "a: [": "not YAML in line 1: ",
    "model: !x y": "not YAML in line 1: a tag such as !x has no meaning here",
    "a: &a [*a]": "not YAML in line 1: found unconstructable recursive node",
    "a: " + "[" * 3000: "nested too deeply",
    "1: 2": "unknown key 1; see --help",
    "? [a]\n: b": "the key ['a'] must be the name of a flag",
    "seq_lne: 3": "unknown key seq_lne; the nearest is seq_len; see --help",
    "learning_rate: 3": "unknown key learning_rate: take --optim.lr",
    "optim: {learning_rate: 3}": "unknown key optim.learning_rate: take --optim.lr",
    "data: {path: a.jsonl}": "unknown key data.path: take data.files, --data on the",
    "data: {val_path: a.jsonl}": "unknown key data.val_path: take data.val, --data.val",
    "lora: {export: true}": "unknown key lora.export: take --export_every",
    "optim: {state: int8}": "unknown key optim.state: take --optim.moment_dtype",
    "training: {seq_len: 3}": "unknown key training.seq_len: take --seq_len",
    "steps: 3\nsteps: 4": "steps is there twice: leave one out",
    "optim: {lr: 1}\noptim.lr: 2": "optim.lr is there twice",
    "optim: {lr: abc}": "--optim.lr=abc must be FLOAT",
    "optim: {lr: [1, 2]}": "optim.lr=[1, 2] must be one value, not a list",
    "optim: {betas: 0.9}": "--optim.betas=0.9 must be FLOAT FLOAT",
    "optim: 3e-4": "optim=3e-4 must be a section with keys: name, moment_dtype, lr, betas,",
    "data: {files: {a: b}}": "data.files is nested too deeply",
    "data: []": "--data names no file",
    "prompts: [-a, b]": "--prompts: '-a' must not begin with a dash",
    "resume: maybe": "resume=maybe must be true or false",
    "seq_len:": "seq_len has no value: give one, or leave the key out",
    "seq_len: 1": "--seq_len=1 must be at least 2",
    "steps: 1.5": "--steps=1.5 must be INT",
    "attn: palas": "--attn=palas must be one of auto, cudnn",
    "steps: 3\nepochs: 2": "--steps=3 and --epochs=2 contradict: leave one out",
    "batch_size: 3\nrows_per_device: 3": "--batch_size=3 and --rows_per_device=3 contradict",
    "recipe: no_such": "--recipe=no_such must be one of ",
    "config: x.yaml": "config is for the command line only",
}


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes_are_one_line_with_the_name_of_the_file(text, tmp_path, capsys):
    assert main([write(tmp_path, text)]) == 2
    said = capsys.readouterr().err
    assert f"run.yaml: {MISTAKES[text]}" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"a": 1, "a": 2}', "a.json: a is there twice"),
        ("a.json", "{", "a.json: not JSON: "),
        ("a.txt", "", "a.txt must end with .yaml, .yml, .json or .py"),
        ("a.yaml", b"\xff", "a.yaml: not UTF-8"),
        ("a.yaml", LFS_HEADER, "a.yaml is a Git LFS pointer"),
        ("a.py", LFS_HEADER, "a.py is a Git LFS pointer"),
        (None, "", "there is no file nowhere.yaml"),
    ],
)
def test_files_of_another_kind(name, text, message, tmp_path, capsys):
    if name is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main([f"--config={tmp_path / name if name else 'nowhere.yaml'}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_missing_name_of_a_file(capsys):
    assert main(["--config"]) == 2
    assert capsys.readouterr().err == (
        "error: Missing value for argument '--config'. Expected 1 values.\n"
    )


def test_switches_and_lists_of_the_file_can_be_replaced(tmp_path):
    text = "resume: no\nscan_layers: true\nprompts: [a, b]\ndata: {strict: yes, files: [a, b]}"
    flags = ["--resume", "--data.no_strict", "--scan_layers=False", "--prompts", "z", "--data", "c"]
    config = parse_flags([write(tmp_path, text), *flags])
    assert (config.resume, config.data.strict, config.scan_layers) == (True, False, False)
    assert (config.prompts, config.data.files) == (("z",), ("c",))


def test_a_flag_of_the_command_line_is_not_blamed_on_the_file(tmp_path):
    with pytest.raises(ValueError, match="^--seq_len=1 must be at least 2"):
        parse_flags([write(tmp_path, "seq_len: 64"), "--seq_len=1"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "a b.txt", "c.txt:2", "--epochs=2", "--prompts", "hi: x", "two\nlines"],
        ["--optim.name=adafactor", "--optim.schedule=constant", "--guard.spike=inf"],
        ["--optim.schedule=wsd", "--no_resume", "--log", "wandb", "--rows_per_device=4"],
    ],
)
def test_what_repeats_a_run(flags, tiny, tmp_path, monkeypatch, capsys):
    """The printed command and --print_config, which is the same when it is read back."""
    monkeypatch.chdir(tmp_path)
    for file in ("a b.txt", "c.txt"):
        (tmp_path / file).write_text("text")
    run = resolve(parse_flags(["--model=tiny", *flags]))
    assert main(["--model=tiny", *flags, "--print_config"]) == 0
    comment, remark, printed = capsys.readouterr().out.split("\n", 2)
    assert comment.startswith("# chosen for cpu: ") and remark.startswith("# without these lines")
    again = resolve(parse_flags([write(tmp_path, printed)]))
    assert as_yaml(again) == as_yaml(run) == printed
    assert as_command(again) == as_command(run)
    assert (again.rows, again.steps, again.plan, again.out) == (
        *(run.rows, run.steps, run.plan),
        run.out,
    )


def test_config_of_a_run(tiny, finished):
    """A run's directory repeats its flags, with the defaults of the program for the others."""
    recorded = json.loads((finished / "config.json").read_text())["flags"]
    config = parse_flags([f"--config={finished}", "--log_every=3"])
    assert (config.model, config.steps, config.optim.lr) == ("tiny", 8, 1e-2)
    assert config.out == recorded["out"] and config.log_every == 3


@pytest.mark.parametrize(("export", "every"), [(True, 250), (False, 0)])
def test_config_of_a_run_of_an_older_version(export, every, tmp_path):
    """Renamed flags keep their values; lora.export wrote an adapter with every checkpoint."""
    flags = {"accum": 2, "keep": 3, "optim.warmup": 0.1, "optim.decay": 0.2, "optim.state": "int8"}
    flags |= {"data.overlong": "head", "device": None, "optim.schedule": "wsd"}
    flags |= {"lora.rank": 4, "lora.export": export, "save_every": 250, "batch_size": 4}
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags, "chosen": {}}))
    config = parse_flags([f"--config={tmp_path}"])
    assert (config.grad_accum, config.keep_last, config.export_every) == (2, 3, every)
    assert config.optim.warmup_ratio == 0.1 and config.optim.decay_ratio == 0.2
    assert config.optim.moment_dtype == "int8" and config.data.too_long == "head"


def test_no_file_is_no_change():
    assert parse_flags([]) == Config()


@pytest.mark.parametrize("remat", REMAT)
def test_every_remat_can_be_read_from_a_file(tmp_path, remat):
    """Also "none", which is not the absence of a value."""
    (tmp_path / "a.yaml").write_text(f"remat: {remat}\n")
    assert parse_flags([f"--config={tmp_path / 'a.yaml'}"]).remat == remat
