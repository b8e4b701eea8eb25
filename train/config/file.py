"""Read the values of flags from a YAML or JSON file: the keys are the flags, nested or dotted.

The text of every value is parsed like a word of the command line. So YAML's own types do not
matter: 1e-4 is a number, 10:12 is not base 60, and `model: no` is the name "no".
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from models.cli import nearest
from train.config.config import Config
from train.config.synonyms import RENAMED, SYNONYMS
from train.config.words import Kind, flag_kinds, flatten_config

Values = dict[str, Any]
"""Values by flag: text, a list of texts, a bool, or None for the choice of the program."""

SUFFIXES = (".yaml", ".yml", ".json")
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULL = ("", "~", "null")  # not "none", which is a --remat
COMMAND_LINE_ONLY = ("config", "print_config")


def read_values(path: Path) -> Values:
    """Read the flags in a file: YAML, or JSON if its suffix is .json, also config.json of a run.

    Raises:
        ValueError: The file is not valid, a key is unknown or twice in the file, or a value is a
            list or a mapping where it may not be one. The message does not name the file.
        OSError: The file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = _read_json(text) if path.suffix == ".json" else _read_yaml(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if content in (None, "", {}):
        raise ValueError("the file is empty, must have keys such as seq_len: 4096")
    if not isinstance(content, dict):
        what = "a list" if isinstance(content, list) else f"the text {content!r:.40}"
        raise ValueError(f"the file is {what}, must have keys such as seq_len: 4096")
    if {"flags", "chosen"} <= content.keys():
        return _checked(_differing(content["flags"]))
    return _checked(_flatten(content))


def _read_json(text: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=str, parse_float=str, parse_constant=str
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"not YAML{line}: {problem or error}") from error


class _Loader(yaml.BaseLoader):
    """Loader of text, lists and mappings only; refuses tags, and keys that are there twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not node.tag.startswith("tag:yaml.org,2002:"):
            raise yaml.constructor.ConstructorError(
                problem=f"a tag such as {node.tag} has no meaning here",
                problem_mark=node.start_mark,
            )
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        return _unique(
            [(self.construct_object(k), self.construct_object(v)) for k, v in node.value]
        )


def _unique(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r:.40} must be the name of a flag")
        if key in found:
            raise ValueError(f"{key} is there twice: leave one out")
        found[key] = value
    return found


def _differing(flags: Any) -> Iterator[tuple[str, Any]]:
    """Yield the flags of a run's config.json that are not defaults.

    They include those of its recipe, so that the recipe itself is not needed. Flags of older
    versions have their present names.
    """
    defaults = json.loads(json.dumps(flatten_config(Config())), parse_int=str, parse_float=str)
    for given, value in _unique([*flags.items()]).items():
        name = RENAMED.get(given, given)
        if given == "lora.export":  # the adapter was exported with every checkpoint
            name, value = (
                "export_every",
                flags.get("save_every") if value else defaults["export_every"],
            )
        if name not in ("recipe", *COMMAND_LINE_ONLY) and value != defaults.get(name):
            yield name, value


def _flatten(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of a mapping with sections."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _checked(pairs: Iterator[tuple[str, Any]]) -> Values:
    """Return values whose flags exist, in the shape of their kind."""
    kinds, defaults, values = flag_kinds(Config), flatten_config(Config()), {}
    for name, value in pairs:
        if kinds.get(name) == "section" and value in (None, ""):
            continue  # all of its lines are comments
        flag = "data.files" if name == "data" else name
        if name in COMMAND_LINE_ONLY:
            raise ValueError(f"{name} is for the command line only: leave it out")
        if kinds.get(flag) == "section":
            keys = ", ".join(f.partition(".")[2] for f in kinds if f.startswith(f"{flag}."))
            raise ValueError(f"{flag}={value} must be a section with keys: {keys}")
        if flag not in kinds:
            raise ValueError(f"unknown key {name}{nearest(name, [*kinds], SYNONYMS)}")
        if flag in values:
            raise ValueError(f"{flag} is there twice: leave one out")
        values[flag] = _shaped(name, kinds[flag], value, defaults[flag])
    return values


def _shaped(name: str, kind: Kind, value: Any, default: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if isinstance(value, dict) or any(isinstance(item, dict | list) for item in items):
        raise ValueError(f"{name} is nested too deeply: its value must be text or a number")
    if isinstance(value, list) and kind != "list":
        raise ValueError(f"{name}=[{', '.join(map(str, items))}] must be one value, not a list")
    if value is None or isinstance(value, str) and value.lower() in _NULL:
        value = None
    elif kind in ("switch", "bool"):
        value = _SWITCH.get(str(value).lower(), value)
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value} must be true or false")
    elif kind == "list":
        return tuple(items)
    if value is None and default is not None:
        if kind == "list":
            return ()
        raise ValueError(f"{name} has no value: give one, or leave the key out")
    return "inf" if value == ".inf" else value  # YAML's own way to write it
