"""Paths of results: refused before the work, with one line."""

import pytest

from jaxattn import tune
from jaxattn.bench import __main__ as bench
from jaxattn.bench.outputs import output_file, picture_file


@pytest.mark.parametrize("flag", ["--out", "--plot"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("missing/x.png", "missing is no directory: make it first"), (".", "is a directory")],
)
def test_the_bench_refuses_what_it_cannot_write(flag, name, message, tmp_path, capsys):
    """Before a cell runs."""
    with pytest.raises(SystemExit):
        bench.main(["--shapes", "smoke", flag, str(tmp_path / name)])
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_the_tuner_refuses_it_too(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--out", str(tmp_path / "missing" / "tuned.json")])
    assert "missing is no directory" in capsys.readouterr().err


def test_a_plot_has_a_format_that_can_be_drawn(tmp_path, capsys):
    """The line names those that can."""
    with pytest.raises(SystemExit):
        bench.main(["--plot", str(tmp_path / "rates.txt")])
    assert "rates.txt must end in one of" in capsys.readouterr().err
    assert picture_file(str(tmp_path / "rates.svg")) == tmp_path / "rates.svg"


def test_what_can_be_written_passes(tmp_path):
    """A new file, and one that is there."""
    (tmp_path / "old.json").touch()
    for name in ("new.json", "old.json"):
        assert output_file(str(tmp_path / name)) == tmp_path / name
