"""A JSON array to parts: cut at the comma after a row, without keeping what was cut off.

The text is read as Latin-1: JSON's own characters are ASCII, and a place in it is one in the file.
Memory: a part and twice the longest row; a row longer than `LONGEST_ROW` is passed over.
"""

import json
import re
from collections.abc import Iterator

from train.data.files.chunks import PEEK, Reader
from train.data.files.shard import LONGEST_ROW, Part


def array_parts(reader: Reader, part: int) -> Iterator[Part]:
    """Yields the parts of the array that `reader` begins with; each is an array of its own."""
    return _Array(reader).parts(part)


def next_row(text: str, start: int) -> int | None:
    """Returns where the row after the unreadable one at `start` begins; None at the end."""
    match = _row_begin(text, start).search(text, start)
    return match.end() if match else None


def skip_space(text: str, position: int) -> int:
    """Returns the place of the first character from `position` on that is not white space."""
    while text[position : position + 1] in (" ", "\n", "\r", "\t"):
        position += 1
    return position


class _Array:
    """What was read of an array and not yet given out.

    `text[begin:]` is not given out; it begins on `line`, and holds the array's own bracket if it is
    the first.
    """

    def __init__(self, reader: Reader):
        self._reader = reader
        self._decode = json.JSONDecoder().raw_decode
        self._text = reader.read(PEEK).decode("latin-1")
        self._first, self._ended, self._line = True, False, 1

    def parts(self, part: int) -> Iterator[Part]:
        at = self._text.index("[") + 1
        begin = at  # of the rows of this part
        while True:
            start = skip_space(self._text, at)
            try:
                after = self._row_end(start)
            except (ValueError, RecursionError, StopIteration) as error:
                long = len(self._text) - start > LONGEST_ROW
                if not long and _may_go_on(error, self._text, start) and self._read_on():
                    continue
                at_end = isinstance(error, StopIteration)
                following = None if at_end else next_row(self._text, start)
                if following is not None and following - start <= LONGEST_ROW:
                    at = following
                elif long and not at_end:
                    yield from self._without_row(at, start, following)
                    at = begin = 0
                elif not self._read_on():
                    break
                continue
            if after - start > LONGEST_ROW:
                yield from self._without_row(at, start, self._following(after))
                at = begin = 0
            elif self._text[after] == "]":
                at = after
            else:
                at = after + 1
                if at - begin >= part:
                    yield self._give_out(after, at)
                    at = begin = 0
        yield Part("array", self._line, self._array(len(self._text), ""), len(self._text))

    def _row_end(self, start: int) -> int:
        """Returns the place of the comma or bracket after the row; StopIteration at the end."""
        text = self._text
        if start >= len(text) or text[start] == "]":
            raise StopIteration
        after = skip_space(text, self._decode(text, start)[1])
        if text[after : after + 1] not in (",", "]"):
            raise json.JSONDecodeError("no ',' or ']' after the row", text, after)
        return after

    def _read_on(self) -> bool:
        more = (
            "" if self._ended else self._reader.read(max(PEEK, len(self._text))).decode("latin-1")
        )
        self._text, self._ended = self._text + more, not more
        return not self._ended

    def _give_out(self, end: int, following: int) -> Part:
        """The rows up to `end` as a part; what is left begins at `following`."""
        given = Part("array", self._line, self._array(end, "]"), following)
        self._line += self._text.count("\n", 0, following)
        self._text, self._first = self._text[following:], False
        return given

    def _array(self, end: int, close: str) -> bytes:
        return (("" if self._first else "[") + self._text[:end] + close).encode("latin-1")

    def _following(self, after: int) -> int:
        return after + (self._text[after] == ",")

    def _without_row(self, at: int, start: int, following: int | None) -> Iterator[Part]:
        """Gives out the rows before `at`, and a "long" part for the one at `start`."""
        pattern = _row_begin(self._text, start)
        before = self._text[:at].rstrip()
        if before not in ("", "["):
            yield self._give_out(len(before) - before.endswith(","), at)
            start -= at
            following = None if following is None else following - at
        text, line, size = self._text, self._line, 0
        line += text.count("\n", 0, start)
        while following is None:
            match = pattern.search(text, start)
            more = "" if match else self._reader.read(PEEK).decode("latin-1")
            if match or not more:
                end = len(text.rstrip())
                following = match.end() if match else end - text[:end].endswith("]")
                break
            dropped = max(0, len(text) - PEEK)  # what is kept may hold the beginning of the match
            self._line += text.count("\n", 0, dropped)
            size, start, text = size + dropped, max(0, start - dropped), text[dropped:] + more
        self._line += text.count("\n", 0, following)
        self._text, self._first = text[following:], False
        yield Part("long", line, b"", size + following)


def _may_go_on(error: Exception, text: str, start: int) -> bool:
    """Whether a row may be unreadable only because the text read so far ends in it."""
    if isinstance(error, StopIteration):
        return start >= len(text)
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")


def _row_begin(text: str, start: int) -> re.Pattern[str]:
    """What ends where the row after the one at `start` begins.

    Rows that begin a line are recognised by the indentation of this one, rows of an array written
    on one line by the `}, {` between objects.
    """
    indent = text[text.rfind("\n", 0, start) + 1 : start]
    begins_line = not indent.strip() and len(indent) < start
    return re.compile(rf"\n{indent}(?=\{{)" if begins_line else r"\}\s*,\s*(?=\{)")
