"""Files to a loader: reads, tokenises, takes shares, packs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from models.tokenizer import Tokenizer
from train.data.corpus import TINY_SHAKESPEARE
from train.data.loader import Loader, check_shares
from train.data.pack.mixture import Split, parse_source, times
from train.data.pack.packing import pack
from train.data.pack.spans import TooLong, cut
from train.data.pack.stream import Stream, stream
from train.data.tokens.dataset import tokenise

Packing = Stream | Literal["fit"]


def open_data(
    paths: Sequence[str | Path] | None,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    strict: bool = False,
    packing: Packing = "fit",
    too_long: TooLong = "drop",
    hold_out: float = 0.0,
    split: Split = "train",
    cache: Path | None = None,
    workers: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
) -> Loader:
    """Reads, tokenises and packs files, and returns the batches.

    Args:
        paths: files (source.read_parts) and directories that the `datasets` library saved, mixed
            as one pool; None for the built-in text.
            `file:2` is twice in every epoch, `file:0.3` a random 30% of it once (share.py).
        tokenizer: makes the ids.
        seq_len: places of a row, at least 2.
        batch_size: rows of a batch over all hosts.
        seed: of every shuffle, >= 0.
        strict: the first broken row is fatal instead of skipped and counted.
        packing: "fit" puts whole documents into rows (packing.py), "concat" and "xtuner" cut a
            stream of all tokens (stream.py).
        too_long: what becomes of chats longer than a row (pieces.cut), with "fit".
        hold_out: share of the documents of each path that is not trained on.
        split: "val" for the batches of what `hold_out` holds out.
        cache: directory that keeps the tokens of `paths` (cache.py); None: the memory does.
        workers: processes that fill the cache; by default one a core. The batches are the same.
        host_index: which host this is, 0..host_count-1, as `jax.process_index()`.
        host_count: hosts that share each batch in equal parts, as `jax.process_count()`. Each
            tokenises all files, or finds them in a cache they share, and makes its own rows only.

    Raises:
        ValueError: a bad argument or bad data; one line that names the file and line.
    """
    if seq_len < 2:
        raise ValueError(f"{seq_len=} must be at least 2: a token and its target")
    if seed < 0:
        raise ValueError(f"{seed=} must not be negative")
    if paths is not None and not paths:
        raise ValueError("no data files are named; name some, or none at all for built-in text")
    check_shares(batch_size, host_index, host_count)
    sources = list(map(parse_source, paths or [TINY_SHAKESPEARE]))
    files = [file for source in sources for file in source.files]
    if hold_out:
        _check_once(files)
    dataset = tokenise(
        files, tokenizer, strict=strict, cache=cache if paths else None, workers=workers
    )
    taken = times(dataset, sources, seed=seed, hold_out=hold_out, split=split)
    if packing == "fit":
        pieces = cut(dataset, seq_len, too_long=too_long, times=taken)
        rows = pack(pieces.length, seq_len, seed=seed)
    else:
        pieces, rows = stream(dataset, seq_len, how=packing, seed=seed, times=taken)
    return Loader(
        dataset,
        pieces,
        rows,
        seq_len=seq_len,
        batch_size=batch_size,
        pad_id=tokenizer.pad_id,
        seed=seed,
        host_index=host_index,
        host_count=host_count,
    )


def _check_once(files: Sequence[Path]) -> None:
    """Raises ValueError where one would hold out documents that another of the same trains on."""
    counts = Counter(file.resolve() for file in files)
    again = next((file for file in files if counts[file.resolve()] > 1), None)
    if again is not None:
        raise ValueError(
            f"{again} is named twice, and a share is held out of each file by itself: name it once,"
            f" and {again}:2 to train on it twice"
        )
