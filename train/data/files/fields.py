"""Typed access to the fields of a row; every complaint names the field in a few words."""

from typing import Any


class RowError(ValueError):
    """A row that cannot be used; the message says why in a few words."""


def objects(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Returns a list of at least one object."""
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"'{key}' must be a list, this is {type_name(items)}")
    if not items:
        raise RowError(f"'{key}' is empty")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise RowError(f"'{key}' {number} must be an object, this is {type_name(item)}")
    return items


def answer(row: dict[str, Any], key: str, where: str = "") -> str:
    """Returns a string that must hold more than white space: there is nothing else to train."""
    value = string(row, key, where)
    if not value or value.isspace():
        raise RowError(f"{where}'{key}' is empty")
    return value


def string(row: dict[str, Any], key: str, where: str = "", *, optional: bool = False) -> str:
    """Returns a string that can be written as UTF-8; "" for an optional one that is not there."""
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{where}'{key}' must be a string, this is {type_name(value)}")
    if value.isascii():  # known of every str, whatever its length: this is most of them
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        # rows.py reads bytes that are not UTF-8 as U+DC80..U+DCFF (surrogateescape).
        raw = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise RowError(f"{where}'{key}' is not UTF-8: {raw} at character {error.start}") from None
    return value


def flag(row: dict[str, Any], key: str, where: str) -> bool:
    """Returns a truth value given as a bool or as a string; true where it is missing or null.

    Tables write null for what a row does not have.
    """
    value = "true" if row.get(key) is None else str(row[key]).lower()
    if value not in ("true", "false"):
        raise RowError(f"{where}'{key}' must be true or false, this is {row[key]!r:.40}")
    return value == "true"


def type_name(value: object) -> str:
    """Names the type of a JSON value, for people."""
    names = {type(None): "null", bool: "a bool", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
