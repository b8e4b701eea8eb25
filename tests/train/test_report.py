"""A report holds all its curves itself, for one run or several; what is no run is said."""

import json

import pytest

from train.report import main

LINE = {
    "loss": 2.0,
    "lr": 1e-3,
    "grad_norm": 1.0,
    "seconds": 1.0,
    "data_seconds": 0.1,
    "checkpoint_seconds": 0.0,
    "evaluation_seconds": 0.0,
    "compute_seconds": 0.9,
    "tokens_per_second": 90.0,
    "all_tokens_per_second": 100.0,
    "loss_tokens_per_second": 80.0,
    "mfu": 0.5,
    "peak_memory_bytes": 2**30,
    "skipped": 1.0,
}
CURVES = "grad_norm loss lr memory mfu skipped time tokens validation"


@pytest.fixture
def run(tmp_path):
    """Makes the directory of a run, by default of 3 steps; its last line is half-written."""

    def make(name, *, evals=True, losses=(2.0, 2.0, 2.0)):
        out = tmp_path / name
        out.mkdir()
        lines = [
            json.dumps({"step": step} | LINE | {"loss": loss}) + "\n"
            for step, loss in enumerate(losses, 1)
        ]
        (out / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
        if evals:
            line = {"step": 3, "set": "a<b", "loss": 1.5, "perplexity": 4.5, "loss_tokens": 9}
            (out / "eval.jsonl").write_text(json.dumps(line) + "\n")
            (out / "config.json").write_text('{"flags": {"seed": 7}}')
        return out

    return make


def test_one_run(run, capsys):
    out = run("one")
    assert main([str(out)]) == 0
    assert f"wrote {out / 'report' / 'report.html'}" in capsys.readouterr().out
    names = sorted(p.name for p in (out / "report").iterdir())
    assert names == sorted([f"{c}.png" for c in CURVES.split()] + ["report.html"])
    page = (out / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 9 and "http" not in page
    assert "1.5000" in page and "50.0%" in page and "&quot;seed&quot;: 7" in page


def test_runs_are_compared(run, tmp_path):
    one, two = run("one"), run("two", evals=False)
    assert main([str(one), str(two), f"--to={tmp_path / 'both'}"]) == 0
    page = (tmp_path / "both" / "report.html").read_text()
    assert "<h1>one, two</h1>" in page and page.count("<tr>") == 3


def test_losses_are_compared_over_the_last_common_steps(run, capsys):
    """Means of steps 11 to 60: of 61 and 60 steps the last 50 that both have."""
    one = run("one", losses=[9.0] * 10 + [2.0] * 51)
    two = run("two", losses=[1.0] * 10 + [2.02] * 50)
    assert main([str(one), str(two)]) == 0
    said = "two: mean loss of steps 11 to 60 2.0200, +1.00% of one's 2.0000"
    assert said in capsys.readouterr().out
    page = (one / "report" / "report.html").read_text()
    assert said.replace("'", "&#x27;") in page


def test_what_is_no_run(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").touch()
    broken = run("broken")
    (broken / "metrics.jsonl").write_text('{"step": 1\n')
    for argv, message in (
        ([], "which runs?"),
        ([str(tmp_path / "none")], "there is no such directory"),
        ([str(tmp_path / "empty")], "there is no metrics.jsonl in it"),
        ([str(tmp_path / "young")], "has no line yet"),
        ([str(broken)], "metrics.jsonl:1 is no record of a run"),
    ):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
