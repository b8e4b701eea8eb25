"""Flags to a frozen dataclass; what is wrong with them is one line."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Sequence

import tyro


def parse[C](config: type[C], argv: Sequence[str], module: str, *, default: C | None = None) -> C:
    """Reads the flags; `--help` prints them and exits.

    Args:
        config: a dataclass; its fields are the flags, sections have a dot.
        argv: what was typed.
        module: the program's, for `--help`.
        default: values of what is not given; None: the dataclass's own.

    Raises:
        ValueError: what is wrong, with the nearest flag if one is unknown.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                config,
                default=tyro.MISSING_NONPROP if default is None else default,
                prog=f"python -m {module}",
                args=list(argv),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_message(said.getvalue())) from stop
    if unknown:
        raise ValueError(_unknown(unknown[0], flags(config)))
    return parsed


def flags(config: type, prefix: str = "--") -> list[str]:
    """Every flag of a dataclass and of its sections."""
    names = []
    for field in dataclasses.fields(config):
        if isinstance(field.default_factory, type):
            names += flags(field.default_factory, f"{prefix}{field.name}.")
        else:  # tyro's own name for it, if it has one; an empty one is its section's
            given = [getattr(m, "name", None) for m in getattr(field.type, "__metadata__", ())]
            name = next((n for n in given if n is not None), field.name)
            names.append(f"{prefix}{name}".rstrip("."))
    return names


def fail(error: object, status: int) -> int:
    """Says what went wrong on one line of stderr; returns the status to exit with."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return status


def _unknown(argument: str, known: list[str]) -> str:
    flag = argument.split("=")[0]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    return f"unknown argument {flag}{f'; the nearest is {near[0]}' if near else ''}; see --help"


def _message(box: str) -> str:
    """What tyro says inside its frame, which has no sides where the terminal is not UTF-8."""
    lines = [line.strip("│ ") for line in box.splitlines()][1:]  # the first one is a title
    if lines and not lines[0].strip("-"):
        del lines[0]
    end = next((i for i, line in enumerate(lines) if not line.strip("─-")), None)
    # What a dataclass or a section of it refuses names its flag itself.
    return re.sub(r"^Error parsing \w+: ", "", " ".join(lines[:end]))
