"""examples/finetune_chat.sh: every command of the script, with a tiny checkpoint."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from string import Template

import jax
import pytest

from models import convert, generate
from train import main as training
from train import preview

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "finetune_chat.sh"
COMMANDS = {
    "train.preview": preview.main,
    "train.main": training.main,
    "models.convert": convert.main,
    "models.generate": generate.main,
}
pytestmark = pytest.mark.usefixtures("compile_quickly")
SMALL = "--seq_len=64 --batch_size=8 --steps=2 --sample_every=0"


@pytest.fixture
def weights(tmp_path) -> Path:
    """Make a directory like a released one: the tiny golden checkpoint and a tiny tokenizer."""
    data = ROOT / "tests" / "data"
    shutil.copytree(data / "internlm2_tiny", tmp_path / "weights")
    for file in (data / "tokenizer_tiny").iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path / "weights")
    return tmp_path / "weights"


def test_script_is_valid_bash():
    """Bash parses the script."""
    subprocess.run(["bash", "-n", str(EXAMPLE)], check=True)


def test_every_command_of_the_script_works(weights, tmp_path, monkeypatch, capsys):
    """An own chat file becomes Hugging Face files with a tokenizer, and the new model answers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    data, out = tmp_path / "chats.jsonl", tmp_path / "run"
    data.write_text(f"{json.dumps({'messages': turns})}\n" * 16)
    values = {"weights": str(weights), "data": str(data), "out": str(out), "more": SMALL}
    lines = [x for x in EXAMPLE.read_text().splitlines() if x.startswith("python -m ")]
    done = []
    for line in lines:
        command = Template(line.replace('"$@"', "$more")).substitute(values)
        _, _, module, *flags = shlex.split(command)
        with jax.numpy_dtype_promotion("standard"):  # as in a user's process
            assert COMMANDS[module](flags) == 0, command
        done.append(module)
    assert done == list(COMMANDS)
    assert (out / "hf" / "tokenizer.json").exists()
    assert json.loads((out / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "dispatch internlm2 attn forward: " in capsys.readouterr().out
