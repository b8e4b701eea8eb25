"""Of several processes one speaks; what it says is there at once."""

import subprocess
import sys

import pytest

from train.log import note, say


@pytest.mark.parametrize("speak", [say, note])
def test_the_first_process_speaks(speak, capsys, monkeypatch):
    speak("one line")
    assert capsys.readouterr().out == "one line\n"
    monkeypatch.setattr("jax.process_index", lambda: 1)
    speak("another")
    assert capsys.readouterr().out == ""


def test_what_is_said_is_there_before_the_process_ends():
    """A log that is read while the run goes on, or after SIGKILL, has every line."""
    program = "import os; from train.log import say; say('here'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("here\n", "")
