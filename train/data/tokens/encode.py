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
from train.data.files.examples import Sample
from train.data.files.fields import RowError
from train.data.files.formats import recognise
from train.data.files.records import Broken, Row, rows_of
from train.data.files.shard import Part
from train.data.files.template import Encoded, encode
from train.data.tokens.documents import DOCUMENT, Documents

_CHUNK = 1 << 20  # bytes of rows tokenised at once: enough for every core, little memory
_CODE = (  # what decides which tokens a row becomes, and where in the cache they stand
    *(
        "files/arrays.py",
        "files/chunks.py",
        "files/fields.py",
        "files/formats.py",
        "files/shard.py",
    ),
    *("files/records.py", "files/examples.py", "files/source.py", "files/tables.py"),
    *("files/template.py", "tokens/documents.py", "tokens/encode.py"),
)


def encode_part(part: Part, tokenizer: Tokenizer) -> Documents:
    """Tokenises a part."""
    tokens: list[np.ndarray] = [np.zeros(0, np.int32)]
    index: list[np.ndarray] = [np.zeros(0, DOCUMENT)]
    formats: Counter[str] = Counter()
    broken: list[tuple[int, str]] = []
    for rows in _chunks(rows_of(part)):
        lines: list[int] = []
        names: list[str] = []
        samples: list[Sample] = []
        for row in rows:
            try:
                name, sample = recognise(_value(row))
            except RowError as error:
                broken.append((row.line, str(error)))
                continue
            lines.append(row.line)
            names.append(name)
            samples.append(sample)
        encoded = encode(samples, tokenizer)
        about = _index(encoded, lines, samples)
        signed = np.where(encoded.trained, encoded.tokens, ~encoded.tokens)
        if unusable := _unusable(encoded, tokenizer.vocab_size):
            broken += [(lines[d], reason) for d, reason in unusable.items()]
            kept = np.ones(len(about), np.bool_)
            kept[list(unusable)] = False
            signed, about = signed[np.repeat(kept, about["length"])], about[kept]
            names = [name for name, keep in zip(names, kept, strict=True) if keep]
        tokens.append(signed)
        index.append(about)
        formats.update(names)
    broken.sort()
    documents = np.concatenate(index)
    return Documents(
        tokens=np.concatenate(tokens),
        index=documents,
        rows=len(documents) + len(broken),
        formats=dict(formats),
        broken=tuple(broken),
    )


def code_fingerprint() -> str:
    """Hash of the template and of all else that the tokens of a file depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _CODE:
        digest.update((Path(__file__).parents[1] / name).read_bytes())
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


def _index(encoded: Encoded, lines: list[int], samples: list[Sample]) -> np.ndarray:
    about = np.zeros(len(lines), DOCUMENT)
    begin, end = encoded.offsets[:-1], encoded.offsets[1:]
    counted = np.concatenate([[0], np.cumsum(encoded.trained)])
    after_first = np.minimum(begin + 1, end)
    about["length"] = end - begin
    about["targets"] = counted[end] - counted[after_first]
    about["line"] = lines
    about["splittable"] = [sample.splittable for sample in samples]
    return about


def _unusable(encoded: Encoded, vocab_size: int) -> dict[int, str]:
    """Documents that cannot be trained on, and why."""
    found = {}
    for d in np.flatnonzero(np.diff(encoded.offsets) < 2):
        found[int(d)] = "the document has no token to predict"
    too_large = np.flatnonzero(encoded.tokens >= vocab_size)
    for d in np.unique(np.searchsorted(encoded.offsets, too_large, "right") - 1):
        largest = encoded.tokens[encoded.offsets[d] : encoded.offsets[d + 1]].max()
        found[int(d)] = f"token {largest} is not below the tokenizer's {vocab_size}"
    return found
