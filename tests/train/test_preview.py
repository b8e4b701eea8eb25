"""The preview shows the tokens with loss, and the report that a run logs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from models.tokenizer import load_tokenizer
from train.data.open import open_data
from train.preview import histogram, main, show_row, show_table


@pytest.fixture
def path(tmp_path):
    rows = [{"question": f"Q{i}", "answer": f"A{i}"} for i in range(9)]
    rows += [{"question": "Q", "answer": ""}, {"question": "long " * 50, "answer": "A"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def batch(path):
    with open_data([path], load_tokenizer("byte"), seq_len=64, batch_size=1) as loader:
        yield next(loader)


def test_answers_alone_stand_between_marks(batch):
    text = show_row(batch, 0, load_tokenizer("byte"), color=False)
    count = int(batch.segment_ids.max())
    assert text.count("--- document") == count == text.count("«") == text.count("»")
    assert "<|im_start|>assistant\n«A" in text and "<|im_end|>»\n" in text
    assert f"--- {int((batch.segment_ids == 0).sum())} tokens of padding" in text


def test_colors(batch):
    assert "assistant\n\033[32mA" in show_row(batch, 0, load_tokenizer("byte"), color=True)


def test_the_table_has_ids_and_what_is_learned(batch):
    head, *lines = show_table(batch, 0, load_tokenizer("byte"), 1000)
    tokens = int((batch.segment_ids > 0).sum())
    assert len(lines) == tokens
    assert lines[0].split() == ["0", "1", "0", "1", "'<s>'"]
    assert sum(" yes " in line for line in lines) == batch.loss_mask.sum()


def test_histogram_holds_every_length():
    lines = list(histogram(np.array([1, 2, 3, 4, 5, 100])))
    assert sum(int(line.split("tokens")[1].split()[0]) for line in lines) == 6
    assert "65 ..       128 tokens" in lines[-1]


def test_the_whole_preview(path, capsys):
    assert main(["--data", str(path), "--seq_len=64", "--rows=2", "--tokens=3", "--no_color"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("tokenizer byte\n")
    assert "=== row 2 of" in output and "9 documents (0 split" in output
    assert "the document mask saves " in output and "broken: " not in output
    with open_data([path], load_tokenizer("byte"), seq_len=64, batch_size=1) as loader:
        lines = [str(loader.report), *loader.report.notes()]
    assert len(lines) == 3 and all(line in output for line in lines)  # as in the log of a run
    assert main(["--data", str(path), "--seq_len=64", "--rows=0", "--all"]) == 0
    output = capsys.readouterr().out
    assert f"broken: {path}:10: 'answer' is empty" in output and f"dropped: {path}:11: " in output


def test_color_by_default_on_a_terminal_only(path, capsys, monkeypatch):
    """Standard output is looked at when the preview is called, not when it is imported."""
    for terminal in (True, False):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal, raising=False)
        assert main(["--data", str(path), "--seq_len=64", "--tokens=0"]) == 0
        assert ("\033[32m" in capsys.readouterr().out) == terminal


def test_the_file_of_a_run(tmp_path, capsys):
    """Its data and row length; flags override them; an XTuner config without a file is refused."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abc " * 20}))
    (tmp_path / "run.yaml").write_text(f"data: {tmp_path / 'a.jsonl'}\nseq_len: 64\nsteps: 9")
    (tmp_path / "xtuner.py").write_text("max_length = 64")
    assert main([f"--config={tmp_path / 'run.yaml'}", "--no_color"]) == 0
    assert "in 2 rows of 64" in capsys.readouterr().out
    assert main([f"--config={tmp_path / 'run.yaml'}", "--seq_len=32", "--no_color"]) == 0
    assert "in 3 rows of 32" in capsys.readouterr().out
    assert main([f"--config={tmp_path / 'xtuner.py'}"]) == 2
    assert "needs --data: files to train on" in capsys.readouterr().err


def test_escape_sequences_in_data_do_not_reach_the_terminal(tmp_path, capsys):
    """Clear-screen and title sequences, as ESC and as 8-bit control characters, bell, return."""
    path = tmp_path / "a.jsonl"
    bad = "a\x1b[2Jb\x9b2Jc\x1b]0;title\x07d\re\x7f"
    path.write_text(json.dumps({"text": bad}) + "\n" + json.dumps({"text": 3, bad: 1}))
    assert main(["--data", str(path), "--seq_len=64", "--no_color"]) == 0
    output = capsys.readouterr().out
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in output)
    assert r"a\x1b[2Jb\x9b2Jc\x1b]0;title\x07d\x0de\x7f" in output


def preview(path, **how) -> subprocess.Popen:
    flags = ["--data", str(path), "--seq_len=64", "--rows=1000", "--tokens=1000"]
    command = [sys.executable, "-m", "train.preview", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def test_a_reader_that_has_seen_enough_is_no_error(path):
    with preview(path) as shown:
        assert shown.stdout.read(5) == b"token"
        shown.stdout.close()
        assert shown.stderr.read() == b""
    assert shown.returncode == 0


def test_ctrl_c_is_one_line(path, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.preview.load_tokenizer", interrupted)
    assert main(["--data", str(path)]) == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"


def test_every_row_is_shown_once_and_text_that_cannot_be_is_escaped(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_text('{"text": "na\u00efve"}')
    with preview(path, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}) as shown:
        output, errors = shown.communicate()
    assert (shown.returncode, errors) == (0, b"")
    assert output.count(b"=== row") == 1
    assert rb"na\xefve" in output and rb"caf\udce9.jsonl: 1 row: " in output


def test_bad_flags_and_data_are_one_line(capsys, tmp_path):
    assert main(["--seq_lne=3"]) == main(["--rows=-1"]) == main(["--tokens=-5"]) == 2
    assert main(["--data", str(tmp_path / "nowhere.txt")]) == 1
    assert capsys.readouterr().err.count("\n") == 4
