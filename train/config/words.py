"""Kinds of flags, and the words of a command line that give a flag a value."""

import dataclasses
import shlex
import typing
from typing import Any, Literal

Kind = Literal["value", "list", "switch", "bool", "section"]
"""A switch is --flag or --no_flag, a bool takes True or False."""


def flag_kinds(config: type, prefix: str = "") -> dict[str, Kind]:
    """Return the kind of every field of a dataclass and of its sections, such as "optim.lr"."""
    kinds: dict[str, Kind] = {}
    for name, hint in typing.get_type_hints(config).items():
        options = (hint, *typing.get_args(hint))
        if dataclasses.is_dataclass(hint):
            kinds[f"{prefix}{name}"] = "section"
            kinds |= flag_kinds(typing.cast(type, hint), f"{prefix}{name}.")
        elif any(typing.get_origin(option) is tuple for option in options):
            kinds[f"{prefix}{name}"] = "list"
        elif bool in options:
            kinds[f"{prefix}{name}"] = "switch" if hint is bool else "bool"
        else:
            kinds[f"{prefix}{name}"] = "value"
    return kinds


def flatten_config(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the value of every flag of a dataclass and of its sections, by flag."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten_config(value, f"{prefix}{field.name}.")
        else:
            flat[f"{prefix}{field.name}"] = value
    return flat


def flag_name(flag: str) -> str:
    """Return the name of a flag as it is typed, without dashes; --data is data.files."""
    return "data" if flag == "data.files" else flag


def flag_words(flag: str, kind: Kind, value: Any) -> list[str]:
    """Return the words of a command line that give a flag its value; None is written "None".

    Raises:
        ValueError: One of several items begins with a dash, like a flag.
    """
    name = flag_name(flag)
    if kind == "switch":
        section, dot, last = name.rpartition(".")
        return [f"--{section}{dot}{'' if value else 'no_'}{last}"]
    if kind == "list" and value is not None and len(value) != 1:
        if dashes := [item for item in map(str, value) if item.startswith("-")]:
            raise ValueError(f"--{name}: {dashes[0]!r:.40} must not begin with a dash")
        return [f"--{name}", *map(str, value)]
    [item] = value if kind == "list" and value is not None else [value]
    return [f"--{name}={item}"]  # after = a value may begin with a dash


def shell(words: list[str]) -> str:
    """Return the words of one flag as they are typed in a shell."""
    name, equals, value = words[0].partition("=")
    first = f"{name}={shlex.quote(value)}" if equals else name
    return " ".join([first, *map(shlex.quote, words[1:])])
