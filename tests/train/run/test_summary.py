"""Log lines of a run: its parameters, and at its end its files, its time and the next commands."""

import dataclasses
import json

import pytest

from train.config.config import Config
from train.config.sections import LoRAConfig
from train.metrics.summary_table import COLUMNS
from train.run import loop
from train.run.resolve import resolve
from train.run.summary import describe_run


def test_last_lines_name_files_time_and_next_commands(finished):
    log = finished.with_suffix(".log").read_text().splitlines()
    end = len(log) - len(COLUMNS) - 1  # of the lines before the table
    done, generate, report, convert = log[end - 4 : end]
    assert done.startswith("done in 0:0") and f"{finished} has checkpoints, metrics.jsonl" in done
    assert generate == f'try it:  python -m models.generate {finished} --prompt "..."'
    assert report == f"curves:  python -m train.report {finished}"
    assert convert == f"weights: python -m models.convert {finished} {finished}/hf"
    for name in ("checkpoints", "metrics.jsonl", "config.json", "sample.txt"):
        assert (finished / name).exists()


def test_last_table_can_be_pasted_and_fits_a_terminal(finished):
    """A column of names and one of values, of the same width in all lines."""
    lines = finished.with_suffix(".log").read_text().splitlines()[-len(COLUMNS) - 1 :]
    assert {line.count("|") for line in lines} == {3}
    assert len({*map(len, lines)}) == 1 and len(lines[0]) <= 80
    assert lines[0].split() == ["|", "run", "|", "finished", "|"]
    assert lines[1].replace("-", "") == "|  |  |"
    values = dict(map(str.strip, line.split("|")[1:3]) for line in lines[2:])
    assert values["devices"] == "8 x cpu" and values["steps"] == "8"


@pytest.mark.parametrize(("format", "chat"), [("messages", True), ("text", False)])
def test_chat_data_are_tried_with_a_chat(format, chat, tiny_run, tmp_path, monkeypatch, capsys):
    turns = [{"role": role, "content": "hello " * 9} for role in ("user", "assistant")]
    rows = [{format: turns if chat else "hello " * 20}] * 30
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(loop, "write_sample", lambda *_: None)
    config = tiny_run(tmp_path / "run")
    data = dataclasses.replace(config.data, files=(str(tmp_path / "rows.jsonl"),))
    loop.run(dataclasses.replace(config, data=data, seq_len=256, steps=1))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("try it")]
    assert (" --chat --prompt" in line) == chat


def test_trained_parameters_of_adapters_are_counted():
    run = resolve(Config(model="nano", lora=LoRAConfig(rank=4)))
    [line] = [text for text in describe_run(run) if "parameters" in text]
    assert ", beside 69,632 trained in adapters (2.10%) on " in line
