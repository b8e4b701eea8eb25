"""Parse flags into a frozen dataclass; a wrong flag is one line."""

import contextlib
import dataclasses
import difflib
import functools
import io
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence

import docstring_parser
import tyro

from models.terminal import discard_output, set_up_streams


def parse[C](
    config: type[C],
    argv: Sequence[str],
    module: str,
    *,
    default: C | None = None,
    synonyms: Mapping[str, str] | None = None,
    ignore_unknown: bool = False,
) -> C:
    """Parse the flags; `--help` prints them and exits.

    Args:
        config: Dataclass whose fields are the flags; flags of a section have a dot.
        argv: Words of the command line.
        module: Program, for `--help`.
        default: Values of flags that are not given; None: the dataclass's own.
        synonyms: Hints for unknown flags by their name, without dashes, in lower case.
        ignore_unknown: Skip unknown flags, for a dataclass with a part of the flags.

    Raises:
        ValueError: A flag is wrong; names the nearest flag if it is unknown.
    """
    if {"-h", "--help"} & {*argv} and not ignore_unknown:
        _join_help(config)
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
                add_help=not ignore_unknown,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_message(said.getvalue())) from stop
    if unknown and not ignore_unknown:
        flag = unknown[0].split("=")[0]
        raise ValueError(f"unknown argument {flag}{nearest(flag, flags(config), synonyms or {})}")
    return parsed


def flags(config: type, prefix: str = "--") -> list[str]:
    """Return every flag of a dataclass and of its sections."""
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
    """Print an error on one line of stderr; return the status to exit with."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return status


def interruptible(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap the main function of a command: Ctrl-C is one line and exit status 130.

    A closed standard output loses the output, one that is full is one line and status 1, and one
    whose reader has ended, such as `head`, is no error.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        set_up_streams()
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            discard_output()
            return 0
        except OSError as error:  # of a print; main itself reports all others
            discard_output()
            return fail(f"standard output cannot be written: {error.strerror or error}", 1)
        except KeyboardInterrupt:
            return fail("stopped by Ctrl-C", 130)

    return run


def _join_help(config: type) -> None:
    """Give each flag its docstring as help on one line; tyro would keep its line breaks."""
    docs = {p.arg_name: p.description for p in docstring_parser.parse_from_object(config).params}
    for field in dataclasses.fields(config):
        if isinstance(field.default_factory, type):  # a section
            _join_help(field.default_factory)
        text = " ".join((docs.get(field.name) or "").split())
        if text:
            field.metadata = types.MappingProxyType({**field.metadata, "help": text})


def nearest(name: str, known: Sequence[str], synonyms: Mapping[str, str]) -> str:
    """Return what to take instead of an unknown flag or key, as the end of a message."""
    plain = name.lstrip("-").replace("-", "_").lower()
    if hint := synonyms.get(plain) or synonyms.get(plain.rpartition(".")[2]):
        return f": {hint}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is {near[0]}; see --help" if near else "; see --help"


_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_KINDS = {"int()": "INT", "float()": "FLOAT", "string to float": "FLOAT"}


def _message(box: str) -> str:
    """Return the text inside tyro's frame, in plain words."""
    box = _STYLE.sub("", box)  # of a terminal
    # The frame has no sides where the terminal is not UTF-8.
    lines = [line.strip("│ ") for line in box.splitlines()][1:]  # the first one is a title
    if lines and not lines[0].strip("-"):
        del lines[0]
    end = next((i for i, line in enumerate(lines) if not line.strip("─-╰╯")), None)
    text = re.sub(r"(\d,) (?=\d{3})", r"\1", " ".join(lines[:end]))  # tyro breaks lines in 1,440
    if found := re.match(
        r"Error parsing (\S+): no type matching (.+) could .* from \[(.*)\]", text
    ):
        flag, kind, values = found.groups()
        kind = kind.removeprefix("{None}|").strip("{}")
        return f"{flag}={values.replace(', ', ' ').replace("'", '')} must be {kind}"
    if found := re.match(r"Error parsing (\S+): .*?(int\(\)|string to float).*: '(.*)'$", text):
        flag, kind, value = found.groups()
        return f"{flag}={value} must be {_KINDS[kind]}"
    if found := re.match(r"invalid choice '(.*)' for argument '(\S+)'\. Expected .*\((.*)\)", text):
        value, flag, choices = found.groups()
        known = sorted(c for c in re.findall(r"'([^']*)'", choices) if c != "None")
        return f"{flag}={value} must be one of {', '.join(known)}"
    if found := re.match(r"Missing from (.*?): (.*)", text):
        parts = (part.split() for part in found[2].split("(required)"))
        names = [" ".join(part[: 2 if part[0].startswith("-") else 1]) for part in parts if part]
        return f"{found[1]} needs {' and '.join(names)}; see --help"
    # A check of a dataclass or of a section names its flag itself.
    return re.sub(r"^Error parsing \w+: ", "", text)
