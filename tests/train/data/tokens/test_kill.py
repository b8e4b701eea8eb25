"""SIGKILL at random moments, and two builders at once: the batches are those of a quiet run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killer.py")


@pytest.fixture
def killer(write, tmp_path):
    """Run killer.py on a file of 1,500 chats in some hundred chunks, and return its output."""
    rows = [{"question": f"Q{i}", "answer": "A" * (i % 37 + 1)} for i in range(1500)]
    path = write("a.jsonl", rows)

    def run(what: str) -> dict:
        root = tmp_path / "root"
        root.mkdir()
        search = os.pathsep.join([str(PROGRAM.parents[4]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, str(PROGRAM), what, str(path), str(root)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": search},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize(("what", "least"), [("building", 10), ("building with workers", 3)])
def test_killed_while_building(killer, what, least):
    """20 times in one process, 5 with workers: what is built after it is whole and the same."""
    said = killer(what)
    assert all(said["same"])
    assert sum(said["unfinished"]) >= least  # most moments were between the first part and the last


def test_killed_while_loading(killer):
    """One run, killed 20 times: every batch byte for byte, none twice, none left out."""
    said = killer("loading")
    assert (said["status"], said["same"]) == (0, True)
    assert len(set(said["reached"])) > 3, said["reached"]


def test_two_processes_build_one_cache_at_once(killer):
    """Both succeed with the same batches; one has waited for the other, and said so."""
    said = killer("two")
    assert (said["statuses"], said["same"]) == ([0, 0], [True, True])
    assert (said["whole"], said["left"]) == (1, 0)
    assert said["said"].count("is being tokenized by another run: waiting for it") == 1
