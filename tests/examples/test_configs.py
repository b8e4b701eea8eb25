"""Each example of a config file plans a run that fits the GPU it is for."""

import json
import re
from pathlib import Path

import pytest

from models.config import PRESETS
from train.config.file import read_values
from train.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
GPUS = {
    "qlora_chat_24gb": "rtx4090",
    "full_32k_one_gpu": "h100",
    "full_7b_8_gpus": "h100",
    "continued_pretraining": "h100",
    "long_rows": "h200",
}


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_fits_the_gpu_that_it_is_for(file, tmp_path, monkeypatch, capsys):
    """The plan is the one in the comment of the file."""
    monkeypatch.chdir(tmp_path)
    values = read_values(file)
    model = Path(values["model"])
    model.mkdir(parents=True)
    preset = PRESETS["internlm2-1.8b" if "1_8b" in model.name else "internlm2-7b"]
    (model / "config.json").write_text(json.dumps(preset.to_hf()))
    for name in values["data.files"]:
        Path(name).write_text("{}")
    argv = [f"--config={file}", "--dry_run", f"--dry_run_device={GPUS[file.stem]}"]
    assert main([*argv, "--tokenizer=byte"]) == 0
    [total] = re.findall(r"^  total +(\S+) of", capsys.readouterr().out, re.M)
    [written] = re.findall(r"plan .*is (\S+) GiB", file.read_text())
    assert float(total) == pytest.approx(float(written), abs=0.05)
