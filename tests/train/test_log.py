"""Log lines reach standard output at once, from the first process; a bad console ends nothing."""

import contextlib
import io
import logging
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from train.log import safe_console, set_up_logging

log = logging.getLogger("train.test")


def test_only_the_first_process_logs(capsys, monkeypatch):
    log.info("one line")
    log.warning("another")
    assert capsys.readouterr().out == "one line\nwarning: another\n"
    monkeypatch.setattr("jax.process_index", lambda: 1)
    log.warning("a third")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["jaxattn.api", "models.load", "train.run"])
def test_level_and_one_handler_for_all_packages(name, capsys):
    """A second call replaces the level and writes no line twice."""
    try:
        set_up_logging("warning")
        logging.getLogger(name).info("hidden")
        logging.getLogger(name).error("shown")
        assert capsys.readouterr().out == "error: shown\n"
    finally:
        set_up_logging()


def test_lines_are_written_above_the_progress_bar(capsys):
    with tqdm(total=2) as bar:
        log.info("between")
        bar.update()
    assert capsys.readouterr().out == "between\n"


def test_control_characters_are_escaped(capsys):
    """Data must not move the cursor or retitle the window of the reader's terminal."""
    log.info("a\x1b[2Jb\x07\tc\nd\x9b")
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x07\tc\nd\\x9b\n"


def test_lines_are_written_before_the_process_ends():
    """A log that is read while a run trains, or after SIGKILL, has every line."""
    program = (
        "import logging, os; from train.log import set_up_logging; set_up_logging();"
        "logging.getLogger('train').info('here'); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("here\n", "")


class Full(io.StringIO):
    """A console on a full disk."""

    def write(self, text=""):
        raise OSError(28, "No space left on device")

    flush = write


def test_a_full_console_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError), contextlib.redirect_stdout(Full()):
        log.info("lost")
    with safe_console():
        log.info("lost")
        print("lost", flush=True)
    assert isinstance(sys.stdout, Full)


def test_a_closed_console_is_no_error():
    """The reader of a pipe ends first, as `head` does; the exit status stays the program's."""
    read, write = os.pipe()
    os.close(read)
    program = (
        "import sys; from train.log import safe_console\n"
        "with safe_console():\n    print('lost', flush=True); print('lost')\n    sys.exit(7)"
    )
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run([sys.executable, "-c", program], stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (7, b"")
