"""Token cache: a file is tokenized once for a tokenizer, and read from the cache after that.

    <cache>/v<version>/<key>/00000.tokens ...    one file a chunk (documents.py), never half written
    <cache>/v<version>/<key>/whole.json          number of chunks; written when all of them exist
    <cache>/v<version>/<key>/lock                held by the process that builds

The key is a hash of the file's bytes, of the tokenizer and of the options that change tokens; the
file's name and date do not matter. An interrupted build continues with the chunks that are missing.
A changed byte is found when the cache is opened, and its chunk is tokenized again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from models.tokenizer import Tokenizer
from train.atomic import replace_text
from train.data.files.formats import Reasoning
from train.data.files.readers import CHUNK, check_path
from train.data.files.records import read_chunks
from train.data.tokens.documents import Damaged, Documents, read_documents
from train.data.tokens.encode import encode_chunk
from train.data.tokens.pool import Encode, Job, write_documents

FORMAT_VERSION = 3
"""Version of everything between the bytes of a file and its tokens: the reading of rows, the
formats, the chat template, the division into chunks, the layout of a chunk. Raise it when one of
them changes the content of a cache; tests/train/data/tokens/test_format_version.py fails until
then."""

_WHOLE = "whole.json"
_NAMED = 3  # stale caches that are named in the log; the rest are counted

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Options of reading and tokenizing files."""

    strict: bool = False  # the first broken row is fatal instead of skipped and counted
    # "keep" puts an answer's reasoning into <think> ... </think>, "drop" drops it.
    reasoning: Reasoning = "keep"
    cache: Path | None = None  # directory of the token cache; None: the tokens are held in memory
    # processes that fill the cache; by default one a core. The tokens are the same.
    workers: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))
    chunk: int = CHUNK  # bytes of a chunk of a file


def open_documents(
    path: Path, tokenizer: Tokenizer, options: ReadOptions, bar: tqdm
) -> list[Documents]:
    """Return the documents of a file, one entry a chunk; tokenize those that are not in the cache.

    The bar moves by the bytes of the file.

    Raises:
        ValueError: the file cannot be used, or the cache cannot be read or written.
        OSError: the disk is full, or a worker died.
    """
    check_path(path)
    encode = functools.partial(encode_chunk, tokenizer=tokenizer, reasoning=options.reasoning)
    if options.cache is None:
        return [_encode(chunk, encode, bar) for chunk in read_chunks(path, size=options.chunk)]
    before = path.stat()
    key = _key(path, tokenizer, options)
    directory = options.cache.expanduser() / f"v{FORMAT_VERSION}" / key
    try:
        found = _open_whole(directory, options.workers)
    except PermissionError as error:
        raise _unusable(directory, "read", error) from error
    except (FileNotFoundError, NotADirectoryError, Damaged) as error:
        if isinstance(error, Damaged):
            log.warning(f"damaged token cache: {error}; tokenizing its chunk again")
        with _lock(directory, path):
            _build(path, before, encode, directory, options, bar)
            found = _open_whole(directory, options.workers)
    else:
        bar.update(before.st_size)
    _check_same(path, before)
    return found


def stale_caches(cache: Path) -> list[Path]:
    """Return the directories in `cache` that only other versions of this program can read."""
    try:
        found = [path for path in cache.expanduser().iterdir() if path.is_dir()]
    except OSError:
        return []
    # A key without a version is older than the first version.
    stale = re.compile(rf"(?!v{FORMAT_VERSION}$)v\d+|[0-9a-f]{{32}}")
    return sorted(path for path in found if stale.fullmatch(path.name))


@functools.cache
def log_stale_caches(cache: Path) -> None:
    """Log the stale caches in `cache`, once in a process."""
    if stale := stale_caches(cache):
        names = ", ".join(path.name for path in stale[:_NAMED])
        more = f" and {len(stale) - _NAMED:,} more" if len(stale) > _NAMED else ""
        log.info(f"token caches of other versions in {cache}, safe to delete: {names}{more}")


def _check_same(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path} changed while it was read: run again when it is complete")


def _encode(chunk, encode: Encode, bar: tqdm) -> Documents:
    documents = encode(chunk)
    bar.update(chunk.size)
    return documents


def _key(path: Path, tokenizer: Tokenizer, options: ReadOptions) -> str:
    with path.open("rb") as file:
        data = hashlib.file_digest(file, "sha256").hexdigest()
    suffix = "".join(path.suffixes[-2:]).lower()  # decides the meaning of the bytes: .txt or .jsonl
    # The fingerprint covers the ids of texts; the id of <s> comes from the tokenizer's config.
    facts = [data, suffix, tokenizer.fingerprint, str(tokenizer.bos_id), options.reasoning]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).hexdigest()


def _open_whole(directory: Path, workers: int) -> list[Documents]:
    """Open all chunks; raise FileNotFoundError if some are missing, Damaged if one has changed."""
    list_ = directory / _WHOLE
    try:
        count = json.loads(list_.read_text())["parts"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{list_}: {error}") from error
    found = len(list(directory.glob("*.tokens")))
    if type(count) is not int or count != found:
        raise Damaged(f"{list_} lists {count!r:.40} chunks, and {found} exist")
    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(read_documents, [_file(directory, i) for i in range(count)]))


def _file(directory: Path, number: int) -> Path:
    return directory / f"{number:05}.tokens"


def _build(
    path: Path,
    before: os.stat_result,
    encode: Encode,
    directory: Path,
    options: ReadOptions,
    bar: tqdm,
) -> None:
    """Make the chunks that are missing or damaged; the caller holds the lock.

    The key belongs to the file as it was `before`: the tokens of other bytes must not get it.
    """
    for left in directory.glob("*.tmp"):  # of a build that was killed
        left.unlink()

    def jobs() -> Iterator[Job]:
        for number, chunk in enumerate(read_chunks(path, size=options.chunk)):
            _check_same(path, before)
            file = _file(directory, number)
            yield (dataclasses.replace(chunk, data=b""), None) if _intact(file) else (chunk, file)
        _check_same(path, before)  # a file that was cut off ends too soon

    count = 0
    for chunk in write_documents(jobs(), encode, workers=options.workers):
        count += 1
        bar.update(chunk.size)
    for left in set(directory.glob("*.tokens")) - {_file(directory, i) for i in range(count)}:
        left.unlink()
    # The file's name is for people.
    replace_text(directory / _WHOLE, json.dumps({"parts": count, "file": str(path)}))


def _intact(file: Path) -> bool:
    try:
        read_documents(file)
    except (FileNotFoundError, Damaged):
        return False
    return True


@contextlib.contextmanager
def _lock(directory: Path, path: Path) -> Iterator[None]:
    """Allow one builder at a time; the system releases the lock of a process that is killed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info(f"{path} is being tokenized by another run: waiting for it")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise _unusable(directory, "written", error) from error
    try:
        yield
    finally:
        lock.release()


def _unusable(directory: Path, done: str, error: Exception) -> ValueError:
    reason = getattr(error, "strerror", None) or error
    return ValueError(
        f"the token cache {directory} cannot be {done} ({reason}): choose another with --data.cache"
    )
