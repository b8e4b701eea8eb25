"""Tokens on disk: a file is tokenised once for a tokenizer and a template, and mapped after that.

    <cache>/<key>/00000.tokens ...    one file a part (documents.py), complete as soon as it exists
    <cache>/<key>/whole.json          there when all parts are
    <cache>/<key>/lock                held by the process that builds

The key is a hash of the file's bytes, of the tokenizer, and of the code from row to token, so that
a cache never has to be cleared to be right; the file's name and date do not matter. A build that is
interrupted, by whatever, goes on with the parts that are missing; one byte that has changed is
noticed when the cache is opened, and its part is made anew.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from models.tokenizer import Tokenizer
from train.atomic import replace_text
from train.data.files.source import check_path, read_parts
from train.data.tokens.documents import Damaged, Documents, read_documents
from train.data.tokens.encode import code_fingerprint, encode_part
from train.data.tokens.pool import Job, write_parts

_WHOLE = "whole.json"


def default_cache() -> Path:
    """Where tokens are kept unless told otherwise: in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "internlm2-jax"


def open_documents(
    path: Path, tokenizer: Tokenizer, *, cache: Path | None, workers: int, bar: tqdm
) -> list[Documents]:
    """The documents of a file, one entry a part; tokenised only if the cache lacks them.

    Args:
        path: the file.
        tokenizer: makes the ids.
        cache: directory of the cache; None: tokenise here and now, and hold the tokens in memory.
        workers: processes that tokenise, threads that check.
        bar: moves by the bytes of the file.

    Raises:
        ValueError: the file cannot be used, or the cache cannot be written.
        OSError: the disk is full, or a worker died.
    """
    check_path(path)
    if cache is None:
        return [_encode(part, tokenizer, bar) for part in read_parts(path)]
    before = path.stat()
    directory = cache.expanduser() / _key(path, tokenizer)
    try:
        found = _open_whole(directory, workers)
    except PermissionError as error:
        raise _unusable(directory, "read", error) from error
    except (FileNotFoundError, NotADirectoryError, Damaged) as error:
        if isinstance(error, Damaged):
            tqdm.write(f"damaged token cache: {error}; tokenising its part again")
        with _lock(directory, path):
            _build(path, before, tokenizer, directory, workers, bar)
            found = _open_whole(directory, workers)
    else:
        bar.update(before.st_size)
    _check_same(path, before)
    return found


def _check_same(path: Path, before: os.stat_result) -> None:
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path} changed while it was read: run again when it is complete")


def _encode(part, tokenizer: Tokenizer, bar: tqdm) -> Documents:
    documents = encode_part(part, tokenizer)
    bar.update(part.size)
    return documents


def _key(path: Path, tokenizer: Tokenizer) -> str:
    with path.open("rb") as file:
        data = hashlib.file_digest(file, "sha256").hexdigest()
    suffix = "".join(path.suffixes[-2:]).lower()  # part of what the bytes mean: .txt or .jsonl
    # The fingerprint is of how text becomes ids; a tokenizer's config names the one that begins it.
    said = [data, suffix, tokenizer.fingerprint, str(tokenizer.bos_id), code_fingerprint()]
    return hashlib.blake2b("\n".join(said).encode(), digest_size=16).hexdigest()


def _open_whole(directory: Path, workers: int) -> list[Documents]:
    """Raises FileNotFoundError where parts are missing, Damaged where one is not what it was."""
    try:
        whole = json.loads((directory / _WHOLE).read_text())
        count, checksum = whole["parts"], whole.pop("sha256")
        if checksum != _checksum(whole):
            raise ValueError("the checksum is wrong")
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{directory / _WHOLE}: {error}") from error
    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(read_documents, [_part(directory, i) for i in range(count)]))


def _part(directory: Path, number: int) -> Path:
    return directory / f"{number:05}.tokens"


def _build(
    path: Path,
    before: os.stat_result,
    tokenizer: Tokenizer,
    directory: Path,
    workers: int,
    bar: tqdm,
) -> None:
    """Makes what is missing or damaged; under the lock.

    The key stands for the file as it was `before`: other bytes, once under it, would stay there.
    """
    for left in directory.glob("*.tmp"):  # of a build that was killed
        left.unlink()

    def jobs() -> Iterator[Job]:
        for number, part in enumerate(read_parts(path)):
            _check_same(path, before)
            file = _part(directory, number)
            yield (dataclasses.replace(part, data=b""), None) if _whole(file) else (part, file)
        _check_same(path, before)  # one that was cut off ends too soon

    count = 0
    for part in write_parts(jobs(), tokenizer, workers=workers):
        count += 1
        bar.update(part.size)
    whole: dict[str, object] = {"parts": count, "file": str(path)}  # the name is for people
    replace_text(directory / _WHOLE, json.dumps(whole | {"sha256": _checksum(whole)}))


def _checksum(whole: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _whole(file: Path) -> bool:
    try:
        read_documents(file)
    except (FileNotFoundError, Damaged):
        return False
    return True


@contextlib.contextmanager
def _lock(directory: Path, path: Path) -> Iterator[None]:
    """One builder at a time; the system releases the lock of a process that is killed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("w")
    except OSError as error:
        raise _unusable(directory, "written", error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"{path} is being tokenised by another run: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unusable(directory: Path, done: str, error: OSError) -> ValueError:
    return ValueError(
        f"the token cache {directory} cannot be {done} ({error.strerror}): choose another with"
        " --data.cache"
    )
