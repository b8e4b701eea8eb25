"""A part's tokens: what the cache keeps, in one file that says of itself whether it is whole.

| bytes of the file | what                                                                    |
| ----------------- | ----------------------------------------------------------------------- |
| 4 N               | tokens, int32: the id where it is trained on, `~id` (negative) where not |
| 25 D              | one `DOCUMENT` for each document                                        |
| any               | JSON: N, D, rows read, formats, broken rows                             |
| 8 + 32            | the JSON's length, and SHA-256 of all bytes before                      |

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
from train.data.tokens.token_array import OnDisk

DOCUMENT = np.dtype(
    [
        ("length", "<i8"),  # tokens
        ("targets", "<i8"),  # of these, trained on; the first never counts, nothing predicts it
        ("line", "<i8"),  # of the file on which it begins
        ("splittable", "?"),  # raw text, as opposed to a chat
    ]
)
_DIGEST = 32
_BLOCK = 1 << 22


class Damaged(Exception):
    """A file of the cache is not what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """D tokenised documents of N tokens together, one after the other.

    Attributes:
        tokens: int32, `~id` where predicting the token does not count; those of a file stay there.
        index: `DOCUMENT`s.
        rows: rows that were read; `rows - D` are broken.
        formats: how many documents of each format (formats.py).
        broken: line and reason of every row that could not be used.
    """

    tokens: Int32[np.ndarray, " N"] | OnDisk
    index: Shaped[np.ndarray, " D"]
    rows: int
    formats: dict[str, int]
    broken: tuple[tuple[int, str], ...]

    @functools.cached_property
    def digest(self) -> str:
        """Hash of all of it."""
        digest = hashlib.sha256()  # processors of today have instructions for it
        for piece in self._bytes():
            digest.update(piece)
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        """Writes the file; it has its name only when it is whole.

        Raises:
            OSError: it cannot be written.
        """
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            for piece in self._bytes():
                file.write(piece)
            file.write(bytes.fromhex(self.digest))

    def _bytes(self) -> list[bytes | memoryview]:
        assert isinstance(self.tokens, np.ndarray)  # what is on disk is not written again
        about = {
            "tokens": len(self.tokens),
            "documents": len(self.index),
            "rows": self.rows,
            "formats": self.formats,
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
    """Opens what `Documents.write` wrote: tokens stay on the disk, to be mapped.

    Every byte is read once, to be checked, without being kept.

    Raises:
        Damaged: a byte is not what was written.
        FileNotFoundError: there is no such file.
    """
    size = path.stat().st_size
    if size < 8 + _DIGEST:
        raise Damaged(f"{path}: {size} bytes are too few")
    with path.open("rb") as file:
        digest = _hash(file, size - _DIGEST)
        if file.read() != bytes.fromhex(digest):
            raise Damaged(f"{path}: the checksum is wrong")
        file.seek(size - 8 - _DIGEST)
        text = int.from_bytes(file.read(8), "little")
        file.seek(size - 8 - _DIGEST - text)
        about = json.loads(file.read(text))
        at = 4 * about["tokens"]
        file.seek(at)
        index = np.frombuffer(file.read(about["documents"] * DOCUMENT.itemsize), DOCUMENT)
    documents = Documents(
        tokens=OnDisk(path, about["tokens"]),
        index=index,
        rows=about["rows"],
        formats=about["formats"],
        broken=tuple((line, reason) for line, reason in about["broken"]),
    )
    vars(documents)["digest"] = digest  # known: fills the cached property
    return documents


def _hash(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size:
        block = file.read(min(size, _BLOCK))
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()
