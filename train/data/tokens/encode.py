"""A chunk to its documents: read rows, recognize formats, tokenize, count broken rows.

The result does not depend on the sequence length: packing.py handles that.
"""

import contextlib
import gc
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from models.tokenizer import Tokenizer
from train.data.files.examples import Example
from train.data.files.fields import RowError
from train.data.files.formats import Reasoning, recognize
from train.data.files.readers import Chunk
from train.data.files.records import BrokenRecord, Record, records_of
from train.data.files.template import Encoded, encode
from train.data.tokens.documents import DOCUMENT, Documents

_BATCH = 1 << 20  # bytes of rows tokenized at once: enough for every core, little memory


@contextlib.contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Turn the garbage collector off.

    Rows and tokens hold no cycles, and looking for some among millions of lists takes a tenth of
    the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_search_for_cycles()
def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, *, reasoning: Reasoning = "keep") -> Documents:
    """Tokenize a chunk; raise `MissingTokens` as `template.encode`."""
    tokens: list[np.ndarray] = [np.zeros(0, np.int32)]
    index: list[np.ndarray] = [np.zeros(0, DOCUMENT)]
    formats: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    remarks: Counter[str] = Counter()
    broken: list[tuple[int, int, str]] = []
    for records in _batches(records_of(chunk)):
        rows: list[Record] = []
        names: list[str] = []
        examples: list[Example] = []
        for record in records:
            if isinstance(record, BrokenRecord):
                broken.append((record.line, record.size, record.reason))
                continue
            try:
                name, example, keys, notes = recognize(record.value, reasoning)
            except RowError as error:
                broken.append((record.line, record.size, str(error)))
                continue
            rows.append(record)
            names.append(name)
            examples.append(example)
            if keys:
                unread.update(keys)
            if notes:
                remarks.update(notes)
        encoded = encode(examples, tokenizer)
        about = _index(encoded, rows, examples)
        signed = np.where(encoded.trained, encoded.tokens, ~encoded.tokens)
        if unusable := _unusable(encoded, tokenizer.vocab_size):
            broken += [(rows[d].line, rows[d].size, reason) for d, reason in unusable.items()]
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
        unread=dict(unread),
        remarks=dict(remarks),
        broken=tuple(broken),
    )


def _batches(records: Iterable[Record | BrokenRecord]) -> Iterator[list[Record | BrokenRecord]]:
    """Group records into batches that are tokenized at once."""
    batch: list[Record | BrokenRecord] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.size
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _index(encoded: Encoded, rows: list[Record], examples: list[Example]) -> np.ndarray:
    about = np.zeros(len(rows), DOCUMENT)
    begin, end = encoded.offsets[:-1], encoded.offsets[1:]
    counted = np.concatenate([[0], np.cumsum(encoded.trained)])
    after_first = np.minimum(begin + 1, end)
    about["length"] = end - begin
    about["targets"] = counted[end] - counted[after_first]
    about["line"] = [row.line for row in rows]
    about["splittable"] = [example.splittable for example in examples]
    data = memoryview(np.ascontiguousarray(encoded.tokens))
    hashes = [
        hashlib.blake2b(data[a:b], digest_size=8).digest()
        for a, b in pairwise(encoded.offsets.tolist())
    ]
    about["hash"] = np.frombuffer(b"".join(hashes), "<u8")
    return about


def _unusable(encoded: Encoded, vocab_size: int) -> dict[int, str]:
    """Return the documents that cannot be trained on, each with the reason."""
    found = {}
    for d in np.flatnonzero(np.diff(encoded.offsets) < 2):
        found[int(d)] = "the document has no token to predict"
    too_large = np.flatnonzero(encoded.tokens >= vocab_size)
    for d in np.unique(np.searchsorted(encoded.offsets, too_large, "right") - 1):
        largest = encoded.tokens[encoded.offsets[d] : encoded.offsets[d + 1]].max()
        found[int(d)] = f"token {largest} is not below the tokenizer's {vocab_size}"
    return found
