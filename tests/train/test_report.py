"""A report is one page with all plots, for one run or several; other files are refused."""

import json

import pytest

from train.metrics.curves import figures
from train.report import main, read_run

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
    """Make the directory of a run, by default of 3 steps; its last line is cut off."""

    def make(name, *, evals=True, losses=(2.0, 2.0, 2.0), data="a.json", tokenizer="byte"):
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
        config = {"flags": {"data.files": [data], "seed": 7}, "chosen": {"tokenizer": tokenizer}}
        (out / "config.json").write_text(json.dumps(config))
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


def test_losses_are_compared_over_the_last_common_steps(run, capsys, monkeypatch):
    """Means of steps 11 to 60: of 61 and 60 steps the last 50 that both have."""
    one = run("one", losses=[9.0] * 10 + [2.0] * 51)
    two = run("two", losses=[1.0] * 10 + [2.02] * 50)
    monkeypatch.chdir(one.parent)
    assert main([str(one), str(two)]) == 0
    text = "mean loss of steps 11 to 60: one 2.0000, two 2.0200 (+1.00%)"
    assert text in capsys.readouterr().out
    assert text in (one.parent / "report" / "report.html").read_text()
    assert not (one / "report").exists()


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"data": "b.json"}, "other data"),
        ({"tokenizer": "b"}, "other tokenizer"),
        ({"data": "b.json", "tokenizer": "b"}, "other data and tokenizer"),
    ],
)
def test_losses_of_other_data_or_tokens_are_not_compared(run, tmp_path, capsys, other, why):
    one, two = run("one"), run("two", **other)
    assert main([str(one), str(two), f"--to={tmp_path / 'both'}"]) == 0
    output = capsys.readouterr().out
    assert f"losses of two and one are not compared: {why}\n" in output and "(+" not in output


def _lines(drawn):
    """Return {label: (color, x, y)} of a figure."""
    [axes] = drawn.axes
    return {line.get_label(): (line.get_color(), *line.get_data()) for line in axes.lines}


def test_a_run_has_one_color_and_nothing_is_cut_off(run):
    """In plots of steps and of validation; the time of a step is without its evaluation."""
    runs = [read_run(run("one", evals=False)), read_run(run("two"))]
    runs[1].steps[1] |= {"seconds": 50.0, "evaluation_seconds": 49.0}
    drawn = dict(figures(runs))
    colors = [_lines(drawn["loss"])["two"][0], _lines(drawn["validation"])["two: a<b"][0]]
    assert colors == ["C1", "C1"]
    assert list(_lines(drawn["time"])["two"][2]) == [1.0, 1.0, 1.0]
    for figure in drawn.values():
        [axes] = figure.axes
        assert axes.get_xlabel() == "step" and axes.get_ylabel()
        low, high = axes.get_ylim()
        for _, _, ys in _lines(figure).values():
            assert low <= min(ys) and max(ys) <= high
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_training_files_have_a_curve_and_a_mean_each(run, capsys):
    """Weighted by tokens; a run's settings are in a Markdown table, that can be pasted."""
    out = run("one")
    sources = ({"a": (1.0, 10)}, {"a": (4.0, 5), "b": (3.0, 1)}, {"b": (None, 1)})
    lines = []
    for step, of_step in enumerate(sources, 1):
        of = {name: {"loss": x, "loss_tokens": n} for name, (x, n) in of_step.items()}
        lines.append({"step": step, **LINE, "sources": of})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "one, loss by training file, last 50 steps: a 2.0000, b 3.0000" in said
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said[:19]]
    assert table[0] == ["run", "one"] and {*"".join(table[1])} == {"-"}
    assert dict(table[2:]) == {
        **dict.fromkeys(("model", "devices", "rows a step", "attention", "precision"), "-"),
        **{"steps": "3", "loss": "2.0000", "best validation": "1.5000", "tokens/s": "90"},
        **{"MFU": "50.0%", "peak GiB": "1.0", "skipped": "1", "time: compute": "90.0%"},
        **{"time: data": "10.0%", "time: evaluation": "0.0%", "time: checkpoint": "0.0%"},
        "versions": "-",
    }
    curves = _lines(dict(figures([read_run(out)]))["sources"])
    assert list(curves["one: a"][1]) == [1, 2] and list(curves["one: b"][1]) == [2]
    (out / "metrics.jsonl").write_text(json.dumps(lines[0] | {"sources": {"a": 3}}) + "\n")
    assert main([str(out)]) == 1 and "no valid 'sources'" in capsys.readouterr().err


def test_steps_whose_loss_is_null_are_left_out(run):
    """Null stands for NaN; the last step's loss is NaN in the table."""
    one = run("one", losses=(2.0, None, None))
    assert main([str(one)]) == 0
    assert "<td>NaN</td>" in (one / "report" / "report.html").read_text()
    assert list(_lines(dict(figures([read_run(one)]))["loss"])["one"][1]) == [1]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1', None),
        ("metrics.jsonl", '{"step": 1\n', "metrics.jsonl:1 is no record of a run"),
        ("metrics.jsonl", '{"step": 1}\n', "the line of step 1 has no valid 'seconds'"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "metrics.jsonl:1 is no record of a run"),
        ("eval.jsonl", '{"step": 3, "set": 1, "loss": 2}\n', "eval.jsonl is no record of a run"),
        ("eval.jsonl", '{"step": 3, "set": "a", "loss": "x"}\n', "has no valid 'loss'"),
        ("config.json", "[]", "config.json must contain a JSON object"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", '{"flags": [], "chosen": 3}', ""),
    ],
)
def test_files_of_another_shape_are_one_line(run, capsys, monkeypatch, file, content, message):
    """A file that a kill cut off is none of them, and a configuration of another shape is shown."""
    out = run("out")
    monkeypatch.chdir(out)
    (out / file).write_text(content)
    status = main([str(out), str(out)])
    error = capsys.readouterr().err
    if message == "":
        assert status == 0
    else:
        assert status == 1 and error.count("\n") == 1
        assert (message or "has no line yet") in error


def test_what_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for argv, status, message in (
        ([], 2, "name the directory of a run"),
        ([str(tmp_path / "none")], 1, "there is no such directory"),
        ([str(tmp_path / "empty")], 1, "there is no metrics.jsonl in it"),
    ):
        assert main(argv) == status
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
