"""A wrong flag of a command of models is one line, without a frame; --help has every flag."""

import subprocess
import sys

import pytest

from models import bench, convert, generate
from models.cli import flags


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (generate, [], "python -m models.generate needs DIR and --prompt TEXT; see --help"),
        (generate, ["x"], "python -m models.generate needs --prompt TEXT; see --help"),
        (generate, ["x", "--prompt"], "Missing value for argument '--prompt'"),
        (generate, ["x", "--promt=a", "--prompt=a"], "unknown argument --promt; the nearest is "),
        (generate, ["x", "--prompt=a", "--dtype=int"], "--dtype=int must be one of bfloat16, "),
        (generate, ["x", "--prompt=a", "--top_k=x"], "--top_k=x must be INT"),
        (generate, ["x", "--prompt=a", "--max_new_tokens=0"], "--max_new_tokens=0 must be at le"),
        (generate, ["x", "--prompt=a", "--top_p=2"], "--top_p=2.0 must be above 0 and at most 1"),
        (generate, ["x", "y", "--prompt=a"], "unknown argument y; see --help"),
        (convert, ["a"], "python -m models.convert needs DST; see --help"),
        (convert, ["a", "b", "--max_shard_gb=0"], "--max_shard_gb=0.0 must be above 0 and finite"),
        (convert, ["a", "b", "--layout=gpt"], "--layout=gpt must be "),
        (convert, ["a", "b", "--beside=c"], "unknown argument --beside: take --assets_from"),
        (
            convert,
            ["a", "b", "--output_dir=c"],
            "unknown argument --output_dir: name the directory as ",
        ),
        (bench, ["--new=x"], "--new=x must be INT"),
    ],
)
def test_a_wrong_flag_is_one_line(command, argv, message, capsys):
    assert command.main(argv) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {message}") and said.err.count("\n") == 1
    assert said.out == "" and "│" not in said.err


@pytest.mark.parametrize(
    ("command", "config"),
    [
        (generate, generate.GenerateConfig),
        (convert, convert.ConvertConfig),
        (bench, bench.BenchConfig),
    ],
)
def test_help_shows_every_flag(command, config, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text, positional = capsys.readouterr().out, ("--dir", "--src", "--dst")
    missing = [flag for flag in flags(config) if flag not in text]
    assert set(missing) <= set(positional)


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        ("> /dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
        (">&-", 3, ""),
        ("| true", 0, ""),
    ],
)
@pytest.mark.parametrize("count", [1, 100_000])  # in the buffer at the end, or in a print
def test_a_console_that_cannot_be_written_is_no_traceback(output, status, said, count):
    code = (
        "import sys, time; from models.cli import interruptible;"
        f"main = interruptible(lambda argv: time.sleep(0.5) or print('x' * {count}) or 3);"
        "sys.exit(main())"
    )
    script = f'"$0" -c "$1" {output}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, code], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (status, said)
