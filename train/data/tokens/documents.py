"""Tokens of a chunk, and the file that keeps them in the cache, with a checksum.

| bytes of the file | content                                                                 |
| ----------------- | ----------------------------------------------------------------------- |
| 4 N               | tokens, int32: the id of a trained token, `~id` (negative) of another   |
| 33 D              | one `DOCUMENT` for each document                                        |
| any               | JSON: N, D, rows read, formats, unread keys, remarks, broken rows       |
| 8 + 32            | length of the JSON, and SHA-256 of all bytes before                     |

N tokens, D documents; numbers are little-endian.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int32, Shaped

from train.atomic import atomic_write
from train.data.tokens.token_array import TokenFile, stamp

DOCUMENT = np.dtype(
    [
        ("length", "<i8"),  # tokens
        ("targets", "<i8"),  # trained tokens; the first never counts, nothing predicts it
        ("line", "<i8"),  # of the file on which it begins
        ("hash", "<u8"),  # of its tokens: equal documents are found by it
        ("splittable", "?"),  # true for raw text, false for a chat
    ]
)
_DIGEST = 32
_BLOCK = 1 << 22


class Damaged(Exception):
    """A file of the cache has changed since it was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """D tokenized documents of N tokens together, one after the other."""

    # `~id` for a token that is not trained on; those of a file stay on the disk
    tokens: Int32[np.ndarray, " N"] | TokenFile
    index: Shaped[np.ndarray, " D"]  # a `DOCUMENT` for each document
    rows: int  # rows that were read; `rows - D` are broken
    formats: dict[str, int]  # number of documents of each format (formats.py)
    unread: dict[str, int]  # for each key that is not read, the number of rows that have it
    remarks: dict[str, int]  # number of times that each remark of formats.py was made
    # (line, bytes, reason) of every row that could not be used
    broken: tuple[tuple[int, int, str], ...]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of tokens, index and the rest, as hexadecimal text."""
        digest = hashlib.sha256()  # faster than blake2 on processors with SHA instructions
        for piece in self._bytes():
            digest.update(piece)
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Write the file atomically; raise OSError if it cannot be written."""
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for piece in self._bytes():
                file.write(piece)
            file.write(bytes.fromhex(self.digest))

    def _bytes(self) -> list[bytes | memoryview]:
        assert isinstance(self.tokens, np.ndarray)  # tokens on the disk are not written again
        about = {
            "tokens": len(self.tokens),
            "documents": len(self.index),
            "rows": self.rows,
            "formats": self.formats,
            "unread": self.unread,
            "remarks": self.remarks,
            "broken": self.broken,
        }
        text = json.dumps(about).encode()
        arrays = [
            memoryview(np.ascontiguousarray(array)).cast("B")
            for array in (self.tokens, self.index.view(np.uint8))
            if array.size  # memoryview cannot cast an empty one
        ]
        return [*arrays, text, len(text).to_bytes(8, "little")]


def read_documents(path: Path) -> Documents:
    """Open a file that `Documents.write` wrote; its tokens stay on the disk.

    Every byte is read once. A wrong checksum raises `Damaged`, a missing file FileNotFoundError.
    """
    with path.open("rb") as file:
        before = stamp(file.fileno())
        size = before[0]
        if size < 8 + _DIGEST:
            raise Damaged(f"{path}: {size} bytes are too few")
        digest = _hash(file, size - _DIGEST)
        if file.read() != bytes.fromhex(digest):
            raise Damaged(f"{path}: the checksum is wrong")
        file.seek(size - 8 - _DIGEST)
        text = int.from_bytes(file.read(8), "little")
        file.seek(size - 8 - _DIGEST - text)
        about = json.loads(file.read(text))
        count, documents = about.pop("tokens"), about.pop("documents")
        file.seek(4 * count)
        index = np.frombuffer(file.read(documents * DOCUMENT.itemsize), DOCUMENT)
    broken = tuple((line, size, reason) for line, size, reason in about.pop("broken"))
    tokens = TokenFile(path, count, before)
    found = Documents(tokens=tokens, index=index, broken=broken, **about)
    vars(found)["digest"] = digest  # fills the cached property
    return found


def _hash(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size:
        block = file.read(min(size, _BLOCK))
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
