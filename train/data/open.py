"""Files to a loader: read, tokenize, weigh, pack."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from models.tokenizer import Tokenizer
from train.data.corpus import TINY_SHAKESPEARE
from train.data.loader import Loader, Shard
from train.data.pack.mixture import Split, name_sources, parse_source, repeats
from train.data.pack.packing import pack
from train.data.pack.spans import TooLong, split_documents
from train.data.pack.stream import Packing, pack_stream
from train.data.tokens.cache import ReadOptions
from train.data.tokens.dataset import tokenize


def open_data(
    paths: Sequence[str | Path] | None,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    packing: Packing = "fit",
    too_long: TooLong = "drop",
    reading: ReadOptions | None = None,
    hold_out: float = 0.0,
    split: Split = "train",
    shard: Shard | None = None,
) -> Loader:
    """Read, tokenize and pack files, and return the batches.

    Args:
        paths: files (records.read_chunks) and directories that the `datasets` library saved, mixed
            as one pool; None for the built-in text. An epoch has `file:2` twice, and a random 30%
            of `file:0.3` once (mixture.repeats).
        tokenizer: makes the ids of texts.
        seq_len: tokens of a row, at least 2.
        batch_size: rows of a batch over all hosts.
        seed: of every shuffle, >= 0.
        packing: "fit" puts whole documents into rows, "concat" and "xtuner" cut a stream of all
            tokens (`train.data.pack.stream`).
        too_long: treatment of chats longer than a row (`split_documents`); for "fit".
        reading: options of reading; the built-in text is never cached.
        hold_out: share of the documents of each path that is not trained on.
        split: "val" for the batches of the held-out documents.
        shard: the rows of each batch that this host has. Each host tokenizes all files, or finds
            them in a cache that the hosts share.

    Raises:
        ValueError: a bad argument or bad data; one line that names the file and line.
    """
    reading, shard = reading or ReadOptions(), shard or Shard()
    if seq_len < 2:
        raise ValueError(f"{seq_len=} must be at least 2: a token and its target")
    if seed < 0:
        raise ValueError(f"{seed=} must not be negative")
    for name, value, known in (
        ("packing", packing, get_args(Packing)),
        ("too_long", too_long, get_args(TooLong)),
        ("split", split, get_args(Split)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}")
    if isinstance(paths, str | Path):  # a string is a sequence, too: of characters
        raise ValueError(f"paths={str(paths)!r} must be a list of files: give [{str(paths)!r}]")
    if paths is not None and not paths:
        raise ValueError("no data files are named; name some, or none at all for built-in text")
    shard.rows_of(batch_size)
    sources = list(map(parse_source, paths or [TINY_SHAKESPEARE]))
    files = [file for source in sources for file in source.files]
    if hold_out:
        _check_once(files)
    if not paths:
        reading = dataclasses.replace(reading, cache=None)
    dataset = tokenize(files, tokenizer, reading)
    taken = repeats(dataset, sources, seed=seed, hold_out=hold_out, split=split)
    if packing == "fit":
        spans = split_documents(dataset, seq_len, taken, too_long=too_long)
        rows = pack(spans.length, seq_len, seed=seed)
    else:
        spans, rows = pack_stream(dataset, seq_len, taken, method=packing, seed=seed)
    return Loader(
        dataset,
        spans,
        rows,
        seq_len=seq_len,
        batch_size=batch_size,
        pad_id=tokenizer.pad_id,
        seed=seed,
        shard=shard,
        sources=name_sources(dataset, sources),
    )


def _check_once(files: Sequence[Path]) -> None:
    """Raise ValueError if a file is named twice: the second would train on held-out documents."""
    counts = Counter(file.resolve() for file in files)
    again = next((file for file in files if counts[file.resolve()] > 1), None)
    if again is not None:
        raise ValueError(
            f"{again} is named twice, and a share is held out of each file by itself: name it once,"
            f" and {again}:2 to train on it twice"
        )
