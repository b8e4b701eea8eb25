"""Memory does not grow with the data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MiB = 1 << 20

PROGRAM = """
import json, resource, sys
from pathlib import Path
from models.tokenizer import load_tokenizer
from train.data.open import open_data
from train.data.tokens.cache import ReadOptions
from train.data.tokens import token_array
token_array.OPEN = 4
paths, cache = [Path(path) for path in sys.argv[2:]], Path(sys.argv[1])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

for path in paths:
    with open_data(
        [path],
        load_tokenizer("byte"),
        seq_len=8192,
        batch_size=8,
        reading=ReadOptions(cache=cache, workers=1),
    ) as loader:
        for _ in range(-(-loader.report.rows // 8)):
            next(loader)
    print(json.dumps([peak(), len(loader.report.broken)]))
"""


@pytest.fixture
def peaks(tmp_path):
    """Read files one after the other in one process; peak in MiB and broken rows after each.

    Their cache is built in this very process, and every token of it is loaded once.
    """

    def run(*paths: Path) -> list[list[int]]:
        arguments = [str(tmp_path / "cache"), *map(str, paths)]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])},
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def write_rows(path: Path, size: int) -> Path:
    row = json.dumps({"question": "Q", "answer": "word " * 800}) + "\n"
    with path.open("w") as file:
        for _ in range(size // len(row)):
            file.write(row)
    return path


def test_memory_does_not_grow_with_the_file(peaks, tmp_path):
    """100 MB after 20 MB; the tokens alone would be 320 MB more."""
    small = write_rows(tmp_path / "small.jsonl", 20 * MiB)
    large = write_rows(tmp_path / "large.jsonl", 100 * MiB)
    (before, _), (after, _) = peaks(small, large)
    assert after - before < 32


@pytest.mark.parametrize("form", ["lines", "array", "array on one line", "text"])
def test_a_line_of_100_mb_is_counted_and_costs_no_more_than_the_limit(peaks, tmp_path, form):
    """It is named with its line, and what stands around it is trained on."""
    begin, between, end = {
        "lines": ("", "\n", "\n"),
        "array": ("[\n", ",\n", "\n]"),
        "array on one line": ("[", ", ", "]"),
        "text": ("", "\n", "\n"),
    }[form]
    good = ['{"text": "%s"}' % ("word " * 300)] * 3
    path = tmp_path / ("a.txt" if form == "text" else "a.json")
    with path.open("w") as file:
        file.write(begin + good[0] + between + '{"text": "')
        for _ in range(100):
            file.write("x" * MiB)
        file.write('"}' + between + good[1] + end)
    small = write_rows(tmp_path / "small.jsonl", 20 * MiB)
    (before, _), (after, broken) = peaks(small, path)
    assert broken == 1
    assert after - before < 200
