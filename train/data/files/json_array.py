"""JSON arrays element by element, with recovery after a broken element."""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

# Also a byte order mark, in text read as UTF-8 and as Latin-1: files that were joined hold some.
_SPACE = re.compile("(?:[ \t\r\n\ufeff]|\u00ef\u00bb\u00bf)*")


class Element(NamedTuple):
    """An element of an array."""

    start: int  # index of its first character
    end: int  # index after the comma that follows it
    value: object  # parsed value; None for an element that cannot be read
    error: Exception | None  # why an element cannot be read


def walk_arrays(text: str) -> Iterator[Element]:
    """Yield the elements of one or more arrays, and text after the last one as an error."""
    decode = json.JSONDecoder().raw_decode
    at = _skip_space(text, 0)
    while text[at : at + 1] == "[":
        at = _skip_space(text, at + 1)
        while text[at : at + 1] != "]":
            element = _element(decode, text, at)
            yield element
            if element.end == len(text):
                return
            at = _skip_space(text, element.end)
        at = _skip_space(text, at + 1)
        if text[at : at + 1] == ",":
            at = _skip_space(text, at + 1)
    if at < len(text):
        yield Element(at, len(text), None, ValueError("text after the end of the array"))


def _element(decode, text: str, at: int) -> Element:
    try:
        value, end = decode(text, at)
        after = _skip_space(text, end)
        if text[after : after + 1] not in (",", "]"):
            raise ValueError("no ',' or ']' after the row")
        return Element(at, after + (text[after] == ","), value, None)
    except (ValueError, RecursionError) as error:
        match = _row_begin(text, at).search(text, at)
        return Element(at, match.end() if match else len(text), None, error)


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None  # the pattern matches no character, too
    return match.end()


def _row_begin(text: str, start: int) -> re.Pattern[str]:
    """Return the pattern of the text before the next row, after a broken row at `start`.

    Rows that begin a line are recognized by the indentation of this one, rows of an array on one
    line by the `}, {` between objects.
    """
    indent = text[text.rfind("\n", 0, start) + 1 : start]
    begins_line = not indent.strip() and len(indent) < start
    return re.compile(rf"\n{indent}(?=\{{)" if begins_line else r"\}\s*,\s*(?=\{)")
