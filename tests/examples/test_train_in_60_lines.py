"""examples/train_in_60_lines.py: the public functions are enough to train and to save a model."""

import re
import runpy
from pathlib import Path

import pytest

from models import load_hf

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_in_60_lines.py"
pytestmark = pytest.mark.usefixtures("compile_quickly")


def test_it_has_sixty_lines():
    """The name of the file is true."""
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_the_loss_falls_and_the_weights_are_hf_files(tmp_path, monkeypatch, capsys):
    """A few steps on repetitive files bring the loss down; `load_hf` reads the saved weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, out = tmp_path / "text.txt", tmp_path / "weights"
    data.write_text("abcdefgh " * 200)
    (tmp_path / "more.txt").write_text("abcdefgh " * 200)
    flags = [str(data), str(tmp_path / "more.txt"), "--steps=4", "--seq_len=64", f"--out={out}"]
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *flags])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [float(x) for x in re.findall(r"step \d/4: loss (\S+)", capsys.readouterr().out)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.5
    assert load_hf(out).config.num_layers == 4
