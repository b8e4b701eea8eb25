"""A stream of bytes to parts: lines of whatever length.

Memory: one part and the longest row; a row longer than `LONGEST_ROW` is passed over.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from train.data.files.shard import LONGEST_ROW, Kind, Part

PEEK = 1 << 20  # bytes by which a file is judged, and what is read of an array at a time
BOM = b"\xef\xbb\xbf"


@runtime_checkable
class Stream(Protocol):
    """A file or a decompressor."""

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes; none at the end."""
        ...


class Reader:
    """A stream of which the beginning was read."""

    def __init__(self, stream: Stream, head: bytes):
        self._stream, self._head = stream, head.removeprefix(BOM)

    def read(self, size: int) -> bytes:
        """Returns `size` bytes, or those up to the end."""
        head, self._head = self._head[:size], self._head[size:]
        return head + read_fully(self._stream, size - len(head))


def line_parts(reader: Reader, kind: Kind, part: int) -> Iterator[Part]:
    """Cuts after the last end of line; a line longer than `LONGEST_ROW` is passed over."""
    line, data, ended = 1, b"", False
    while not ended:
        more = reader.read(part + 1)  # one more than a file of one part has
        data, ended = data + more, len(more) <= part
        cut = len(data) if ended else data.rfind(b"\n") + 1
        if cut:
            yield Part(kind, line, data[:cut], cut)
            line += data.count(b"\n", 0, cut)
            data = data[cut:]
        if len(data) > LONGEST_ROW:
            size, data = _pass_over(reader, data, part)
            yield Part("long", line, b"", size)
            line += 1


def read_fully(stream: Stream, size: int) -> bytes:
    """Reads `size` bytes or to the end; a decompressor may give fewer at a time."""
    pieces, left = [], size
    while left and (piece := stream.read(left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _pass_over(reader: Reader, data: bytes, step: int) -> tuple[int, bytes]:
    """Returns the bytes of the line that `data` begins, and what was read of the next one."""
    size = 0
    while (end := data.find(b"\n")) < 0:
        size += len(data)
        data = reader.read(step)
        if not data:
            return size, b""
    return size + end + 1, data[end + 1 :]
