"""Write the flags that repeat a run, with every choice that was made: a command line or YAML."""

import math
from collections.abc import Iterator
from typing import Any

import yaml

from train.config.config import Config
from train.config.words import flag_kinds, flag_words, flatten_config, shell
from train.run.resolve import Run

_NOT_REPEATED = ("dry_run", "verbose", "recipe", "config", "print_config")
"""Beginnings of flags that a repeated run does not need."""


def as_command(run: Run) -> str:
    """Return a command line, one flag a line."""
    kinds = flag_kinds(Config)
    words = (shell(flag_words(name, kinds[name], value)) for name, value in _flags(run))
    return " \\\n  ".join(["python -m train.main", *words]) + "\n"


def as_yaml(run: Run) -> str:
    """Return a file for --config, nested by section."""
    nested: dict[str, Any] = {}
    for flag, value in _flags(run):
        section, _, name = flag.rpartition(".")
        nested.setdefault(section, {})[name] = _plain(value)
    flags = nested.pop("", {}) | nested
    return yaml.safe_dump(
        flags, sort_keys=False, allow_unicode=True, default_flow_style=None, width=96
    )


def _flags(run: Run) -> Iterator[tuple[str, Any]]:
    """Yield the flags that were given or chosen with their values."""
    defaults, chosen = flatten_config(Config()), run.chosen()
    for flag, value in (flatten_config(run.config) | chosen).items():
        same = value == defaults[flag] and flag not in chosen
        if not same and value is not None and not flag.startswith(_NOT_REPEATED):
            yield flag, value


def _plain(value: Any) -> Any:
    """Return a value that YAML has; its own infinity is .inf."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value
