"""Program output that any terminal can show: control characters and encodings."""

import io
import os
import re
import sys

# C0 without tab and line feed, DEL, C1: a terminal obeys escape sequences made of them.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape_control(text: str) -> str:
    r"""Replace control characters, except tab and line feed, by backslash escapes (\x1b)."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def counted(count: int, noun: str) -> str:
    """Return a number with a noun, such as "1 row" or "12,000 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def discard_output() -> None:
    """Let standard output go nowhere: its reader, such as `head`, has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def set_up_streams() -> None:
    """Make standard output and standard error safe to write to.

    Characters that their encoding lacks become backslash escapes. A stream that was closed before
    the program began writes to nowhere; its file descriptor is taken, so that no file gets it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)
    # Python leaves a closed stream as None.
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
