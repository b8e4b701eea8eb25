"""A part to its documents: read rows, recognise, tokenise, count what is broken.

The result does not depend on the sequence length: what a row of a batch can hold is packing.py's
part.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from models.tokenizer import Tokenizer
from train.data.documents import DOCUMENT, Documents
from train.data.formats import Chat, Ids, RowError, Text, recognise
from train.data.rows import Broken, Row, rows_of
from train.data.source import Part
from train.data.template import Encoded, encode

_CHUNK = 1 << 20  # bytes of rows tokenised at once: enough for every core, little memory
_CODE = ("documents.py", "encode.py", "formats.py", "rows.py", "source.py", "template.py")


def encode_part(part: Part, tokenizer: Tokenizer) -> Documents:
    """Tokenises a part."""
    encoded: list[Encoded] = []
    about: list[tuple[int, int, int, bool]] = []
    formats: Counter[str] = Counter()
    broken: list[tuple[int, str]] = []
    for rows in _chunks(rows_of(part)):
        usable: list[tuple[int, str, Text | Chat | Ids]] = []
        for row in rows:
            try:
                usable.append((row.line, *recognise(_value(row))))
            except RowError as error:
                broken.append((row.line, str(error)))
        samples = encode([sample for _, _, sample in usable], tokenizer)
        for (line, name, sample), document in zip(usable, samples, strict=True):
            reason = _unusable(document, tokenizer)
            if reason is not None:
                broken.append((line, reason))
                continue
            encoded.append(document)
            targets = int(document.trained[1:].sum())
            about.append((len(document.tokens), targets, line, sample.splittable))
            formats[name] += 1
    broken.sort()
    tokens = [np.where(item.trained, item.tokens, ~item.tokens) for item in encoded]
    return Documents(
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        index=np.array(about, DOCUMENT),
        rows=len(about) + len(broken),
        formats=dict(formats),
        broken=tuple(broken),
    )


def code_fingerprint() -> str:
    """Hash of the template and of all else that decides which tokens a row becomes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _CODE:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def _chunks(rows: Iterable[Row | Broken]) -> Iterator[list[Row | Broken]]:
    """Groups rows into what is tokenised at once."""
    chunk: list[Row | Broken] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += row.size
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _value(row: Row | Broken) -> object:
    if isinstance(row, Broken):
        raise RowError(row.reason)
    return row.value


def _unusable(document: Encoded, tokenizer: Tokenizer) -> str | None:
    if len(document.tokens) < 2:
        return "the text has no tokens"
    largest = int(document.tokens.max())
    if largest >= tokenizer.vocab_size:
        return f"token {largest} is not below the tokenizer's {tokenizer.vocab_size}"
    return None
