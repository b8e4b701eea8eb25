"""A part: the stretch of a file that is read, tokenised and kept as one."""

import dataclasses
from typing import Literal

PART = 2 << 20  # bytes of rows: a second or two of work, so that all processes end together
LONGEST_ROW = 32 << 20  # bytes; tokenising one takes some fifty times as much memory

Kind = Literal["array", "lines", "texts", "text", "long"]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file.

    Attributes:
        kind: "array": a JSON array; "lines": a JSON value a line; "texts": a document a line;
            "text": one document; "long": a row too long to be read, left out of `data`.
        line: line of the file on which it begins, from 1; of a table, the row.
        data: its bytes, uncompressed.
        size: bytes it takes in the file.
    """

    kind: Kind
    line: int
    data: bytes
    size: int
