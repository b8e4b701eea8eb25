"""Typed access to the fields of a row; every error names the field in a few words."""

import json
from collections.abc import Iterator
from typing import Any

FLAGS = ("weight", "train", "trainable", "training", "loss", "loss_mask", "output_with_loss")
"""Spellings of "train on this answer": OpenAI, axolotl, Gemma, XTuner and others."""

_TRUE, _FALSE = (True, "true", "1", "1.0"), (False, "false", "0", "0.0")  # 1 == True, 0 == False
_NOTHING = ("", "null", "none")
_LONGEST_NOTHING = max(map(len, _NOTHING))


class RowError(ValueError):
    """A row that cannot be used; the message names the reason in a few words."""


def absent(value: object) -> bool:
    """Return true if an optional value is missing: the one rule for all formats.

    Null, NaN, blank text, the words "null" and "None", "[]" and "{}", and lists and objects that
    hold nothing else, at any depth, also written as JSON: Arrow pads structs with such values.
    """
    if value is None or value != value:
        return True
    if isinstance(value, str):
        text = value.strip()
        if text[:1] in ("[", "{"):
            try:
                return absent(json.loads(text))
            except ValueError:
                return False
        return len(text) <= _LONGEST_NOTHING and text.lower() in _NOTHING
    if isinstance(value, dict):
        return all(map(absent, value.values()))
    return isinstance(value, list) and all(map(absent, value))


def without_padding(value: Any) -> Any:
    """Return a JSON value without the nulls, and structs of nulls, that Arrow pads objects with."""
    if isinstance(value, list):
        return [without_padding(item) for item in value]
    if not isinstance(value, dict):
        return value
    items = ((key, without_padding(item)) for key, item in value.items() if not _padding(item))
    return dict(items)


def _padding(value: object) -> bool:
    if isinstance(value, dict) and value:
        return all(map(_padding, value.values()))
    return value is None


def objects(row: dict[str, Any], key: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("<name> <number>: ", object) for each object of a list that is not padding.

    Raises:
        RowError: the value is no list of objects, or is empty.
    """
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"'{key}' must be a list, this is {type_name(items)}")
    if not items:
        raise RowError(f"'{key}' is empty")
    for number, item in enumerate(items, start=1):
        if item is not None and not isinstance(item, dict):
            raise RowError(f"'{key}' {number} must be an object, this is {type_name(item)}")
        if item is not None and not absent(item):
            yield f"{name} {number}: ", item


def string(row: dict[str, Any], key: str, where: str = "") -> str:
    """Return a string that can be written as UTF-8."""
    if key not in row:
        raise RowError(f"{where}'{key}' is missing")
    return _checked(row[key], key, where)


def optional(row: dict[str, Any], key: str, where: str = "") -> str:
    """Return a string, or "" if the value is absent."""
    value = row.get(key)
    return "" if value is None or absent(value) else _checked(value, key, where)


def answer(row: dict[str, Any], key: str, where: str = "") -> str:
    """Return a string that is not blank: without one there is nothing to train."""
    value = string(row, key, where)
    if not value or value.isspace():
        raise RowError(f"{where}'{key}' is empty")
    return value


def content(row: dict[str, Any], key: str, where: str) -> str:
    """Return the text of a message; "" for null or blank text.

    A list of OpenAI's parts is joined; only parts of type text are read.
    """
    value = row.get(key)
    if isinstance(value, list):
        value = "".join(_part(part, key, where) for part in value)
    if value is None:
        return ""
    text = _checked(value, key, where)
    return "" if text.isspace() else text


def trained(turn: dict[str, Any], where: str) -> bool:
    """Return false if a flag of an answer excludes it from the loss, in any spelling."""
    # Checks every flag: an unreadable one is an error beside a false one, too.
    return all([_flag(turn, key, where) is not False for key in FLAGS if key in turn])


def flag(row: dict[str, Any], key: str) -> bool | None:
    """Return the value of a flag; None if it is absent or no flag."""
    try:
        return _flag(row, key, "")
    except RowError:
        return None


def type_name(value: object) -> str:
    """Return the name of a JSON value's type, for people."""
    names = {type(None): "null", bool: "a bool", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]


def _flag(row: dict[str, Any], key: str, where: str) -> bool | None:
    value = row[key]
    if absent(value):
        return None
    plain = value.strip().lower() if isinstance(value, str) else value
    if plain in _TRUE:
        return True
    if plain in _FALSE:
        return False
    raise RowError(f"{where}'{key}' must be true or false, or 1 or 0, this is {value!r:.40}")


def _part(part: object, key: str, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else type_name(part)
        raise RowError(f"{where}'{key}' has a part that is not text: {kind!r:.40}")
    return content(part, "text", where)


def _checked(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{where}'{key}' must be a string, this is {type_name(value)}")
    if value.isascii():  # a flag of every str, whatever its length: most are ASCII
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        # records.py reads bytes that are not UTF-8 as U+DC80..U+DCFF (surrogateescape).
        raw = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise RowError(f"{where}'{key}' is not UTF-8: {raw} at character {error.start}") from None
    return value
