"""Memory does not grow with the data."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


FORMS = {
    "lines": ("", "\n", "\n"),
    "array": ("[\n", ",\n", "\n]"),
    "array on one line": ("[", ", ", "]"),
    "text": ("", "\n", "\n"),
}
"""Text before, between and after the rows of a file, by form."""


def peaks(cache: Path, *paths: Path) -> list[list[int]]:
    """Read files one after the other in one process; peak in MiB and broken rows after each.

    Their cache is built in this very process, and every token of it is loaded once.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cache), *map(str, paths)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def write_rows(path: Path, size: int) -> Path:
    row = json.dumps({"question": "Q", "answer": "word " * 800}) + "\n"
    with path.open("w") as file:
        for _ in range(size // len(row)):
            file.write(row)
    return path


def write_long_line(path: Path, form: str) -> Path:
    """Write a row of 100 MB between two good ones."""
    begin, between, end = FORMS[form]
    good = '{"text": "%s"}' % ("word " * 300)
    with path.open("w") as file:
        file.write(begin + good + between + '{"text": "')
        for _ in range(100):
            file.write("x" * MiB)
        file.write('"}' + between + good + end)
    return path


def test_memory_grows_neither_with_the_file_nor_with_a_line(tmp_path):
    """Less than 32 MiB for 100 MB after 20 MB, of which the tokens alone would be 320 MB more.

    A line of 100 MB is counted as broken and costs no more than the limit; what stands around it is
    trained on. One process reads all: the peak of a process never falls, so each file has the bound
    by itself.
    """
    small = write_rows(tmp_path / "small.jsonl", 20 * MiB)
    large = write_rows(tmp_path / "large.jsonl", 100 * MiB)
    names = {form: f"{form}.{'txt' if form == 'text' else 'json'}" for form in FORMS}
    long = [write_long_line(tmp_path / name, form) for form, name in names.items()]
    (before, _), (after, _), *others = peaks(tmp_path / "cache", small, large, *long)
    assert after - before < 32
    for form, (after, broken) in zip(FORMS, others, strict=True):
        assert broken == 1, form
        assert after - before < 200, form
