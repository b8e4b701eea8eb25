"""The cache: the same tokens as without it, whatever interrupts or damages it."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from train.data.files.records import read_chunks
from train.data.tokens import cache as cache_module
from train.data.tokens.cache import ReadOptions
from train.data.tokens.dataset import tokenize


@pytest.fixture
def path(write):
    rows = [{"question": f"Q{i}", "answer": "A" * (i % 37 + 1)} for i in range(300)]
    rows[7]["answer"] = ""
    return write("a.jsonl", rows)


def reading(cache: Path, **more) -> ReadOptions:
    """Chunks of a KiB, so that a small file has many."""
    return ReadOptions(**{"cache": cache, "workers": 1, "chunk": 1024} | more)


def same(a, b) -> bool:
    return all(
        np.array_equal(getattr(a, name)[:], getattr(b, name)[:])
        for name in ("tokens", "offsets", "targets", "splittable", "hashes", "file", "line")
    ) and (a.files, a.broken) == (b.files, b.broken)


def parts(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.tokens"))


@pytest.mark.parametrize("workers", [1, 3])
def test_cached_tokens_are_those_of_the_memory(path, tokenizer, tmp_path, workers, monkeypatch):
    """Made by one process or three, and read again without tokenizing."""
    cache = tmp_path / "cache"
    plain = tokenize([path], tokenizer)
    made = tokenize([path], tokenizer, reading(cache, workers=workers))
    assert same(plain, made)
    assert len(parts(cache)) > 10
    monkeypatch.setattr(cache_module, "write_documents", None)  # would fail if it were called
    again = tokenize([path], tokenizer, reading(cache))
    assert same(plain, again) and again.digest == made.digest


def test_other_data_and_another_tokenizer_have_another_place(path, tokenizer, tmp_path, write):
    cache = tmp_path / "cache"

    tokenize([path], tokenizer, reading(cache))
    tokenize([path], dataclasses.replace(tokenizer, fingerprint="other"), reading(cache))
    begun = dataclasses.replace(tokenizer, bos_id=2)
    assert same(tokenize([path], begun), tokenize([path], begun, reading(cache)))
    path.write_text(path.read_text().replace("Q17", "Q00"))
    tokenize([path], tokenizer, reading(cache))
    assert len(list(cache.glob("*/*"))) == 4


def test_the_same_bytes_under_another_name_are_not_tokenized_again(path, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    tokenize([path], tokenizer, reading(cache))
    moved = path.rename(tmp_path / "b.jsonl")
    dataset = tokenize([moved], tokenizer, reading(cache))
    assert len(list(cache.glob("*/*"))) == 1
    assert str(dataset.broken[0]) == f"{moved}:8: 'answer' is empty"


@pytest.mark.parametrize("place", [0.0, 0.3, 0.97, 1.0])
def test_a_flipped_byte_is_found_and_its_part_made_anew(path, tokenizer, tmp_path, place, caplog):
    """In tokens, index, JSON and checksum; no other part is touched."""
    cache = tmp_path / "cache"
    plain = tokenize([path], tokenizer)
    tokenize([path], tokenizer, reading(cache))
    damaged = parts(cache)[3]
    before = {part: part.stat().st_mtime_ns for part in parts(cache)}
    data = bytearray(damaged.read_bytes())
    data[int((len(data) - 1) * place)] ^= 1
    damaged.write_bytes(data)
    assert same(plain, tokenize([path], tokenizer, reading(cache)))
    assert "the checksum is wrong" in caplog.text
    touched = [part for part in parts(cache) if part.stat().st_mtime_ns != before[part]]
    assert touched == [damaged]


@pytest.mark.parametrize("change", ["cut off", "rewritten"])
@pytest.mark.parametrize("after", [0, 2, None])
def test_a_file_that_changes_while_it_is_read_leaves_nothing_behind(
    path, tokenizer, tmp_path, monkeypatch, change, after
):
    """Before, between or after its parts; when its bytes are back, so are its tokens."""
    cache = tmp_path / "cache"
    plain, content = tokenize([path], tokenizer), path.read_bytes()
    other = content[:2500] if change == "cut off" else content.replace(b"A", b"B") + b"\n"

    def changing(path, size):
        number = 0
        if after == 0:
            path.write_bytes(other)
        for number, part in enumerate(read_chunks(path, size=size), start=1):
            yield part
            if number == after:
                path.write_bytes(other)
        if after is None:
            path.write_bytes(other)

    monkeypatch.setattr(cache_module, "read_chunks", changing)
    with pytest.raises(ValueError, match="a.jsonl changed while it was read: run again when"):
        tokenize([path], tokenizer, reading(cache))
    path.write_bytes(content)
    monkeypatch.setattr(cache_module, "read_chunks", read_chunks)
    assert not list(cache.rglob("whole.json"))
    assert same(plain, tokenize([path], tokenizer, reading(cache)))


def test_a_cut_off_part_and_a_broken_list_are_made_anew(path, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    plain = tokenize([path], tokenizer)
    tokenize([path], tokenizer, reading(cache))
    os.truncate(parts(cache)[0], 10)
    assert same(plain, tokenize([path], tokenizer, reading(cache)))
    next(cache.rglob("whole.json")).write_text("{")
    assert same(plain, tokenize([path], tokenizer, reading(cache)))


@pytest.mark.parametrize(
    "parts",
    [b"9", b"0", b"-1", b"99", b"1.0", b'"x"', b"[]", b"null", b"1000000000", b"[" * 99_999],
)
def test_a_list_that_says_another_number_of_parts_is_made_anew(
    path, tokenizer, tmp_path, parts, caplog
):
    """One byte would leave out chunks, or make the list endless."""
    cache = tmp_path / "cache"
    made = tokenize([path], tokenizer, reading(cache))
    whole = next(cache.rglob("whole.json"))
    content = whole.read_bytes()
    whole.write_bytes(re.sub(rb'"parts": \d+', b'"parts": ' + parts, content))
    assert same(made, tokenize([path], tokenizer, reading(cache)))
    assert "damaged token cache: " in caplog.text and "whole.json" in caplog.text
    assert whole.read_bytes() == content


BUILD = """
import sys
from pathlib import Path
from models.tokenizer import load_tokenizer
from train.data.tokens.cache import ReadOptions
from train.data.tokens.dataset import tokenize
if __name__ == "__main__":
    print("begun", flush=True)
    reading = ReadOptions(cache=Path(sys.argv[2]), workers=2, chunk=256)
    tokenize([Path(sys.argv[1])], load_tokenizer("byte"), reading)
"""


def start_build(path: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path), str(cache)], stdout=subprocess.PIPE, text=True
    )


def test_killed_while_building_it_goes_on_where_it_was(path, tokenizer, tmp_path):
    """SIGKILL after some parts; they are kept, the rest is made, and the workers are gone."""
    cache = tmp_path / "cache"
    with start_build(path, cache) as build:
        while len(parts(cache)) < 5:
            assert build.poll() is None
            time.sleep(0.001)
        build.kill()
    assert build.returncode == -signal.SIGKILL
    kept = {part: part.stat().st_mtime_ns for part in parts(cache)}
    assert not list(cache.rglob("whole.json"))
    again = tokenize([path], tokenizer, reading(cache, chunk=256))
    assert same(tokenize([path], tokenizer), again)
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert len(parts(cache)) > len(kept)
    assert not list(cache.rglob("*.tmp"))


def test_workers_end_with_the_builder_and_hold_no_jax(path, tmp_path):
    """Even if SIGKILL ends it. They import neither jax nor the main program."""
    with start_build(path, tmp_path / "cache") as build:
        workers = []
        while not (workers and all("numpy" in maps_of(pid) for pid in workers)):
            assert build.poll() is None
            workers = workers_of(build.pid)
        build.send_signal(signal.SIGSTOP)  # so that it cannot end its workers
        time.sleep(1)  # they import what else they need and wait for work
        maps = [maps_of(pid) for pid in workers]
        build.kill()
    assert all("numpy" in text and "jaxlib" not in text for text in maps)
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def maps_of(pid: int) -> str:
    """Return the files that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


def workers_of(parent: int) -> list[int]:
    """Return the processes that multiprocessing started for a process to work for it."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if int(status[1]) == parent and b"spawn_main" in command:
                found.append(int(pid))
    return found


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_two_builders_make_one_cache(path, tokenizer, tmp_path, caplog):
    """The second waits, says so, and reads what the first made."""
    cache = tmp_path / "cache"
    tokenize([path], tokenizer, reading(cache))
    (directory,) = cache.glob("*/*")
    (directory / "whole.json").unlink()
    made = []
    caplog.set_level("INFO")
    with cache_module._lock(directory, path):
        second = threading.Thread(
            target=lambda: made.append(tokenize([path], tokenizer, reading(cache)))
        )
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join()
    assert "being tokenized by another run: waiting" in caplog.text
    assert same(tokenize([path], tokenizer), made[0])


class Deadly:
    """A function that ends the process that it is sent to."""

    def __call__(self, *_, **__):
        raise AssertionError("not in this process")

    def __reduce__(self):
        return os._exit, (1,)


def test_a_worker_that_dies_is_one_clear_error(path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "encode_chunk", Deadly())
    with pytest.raises(OSError, match=r"a process that tokenizes died: out of memory\?"):
        tokenize([path], tokenizer, reading(tmp_path / "cache", workers=2))


def test_a_cache_that_cannot_be_written_names_the_flag(path, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choose another with --data.cache"):
        tokenize([path], tokenizer, reading(tmp_path / "file" / "cache"))


def test_a_cache_that_cannot_be_read_names_the_flag(path, tokenizer, tmp_path, monkeypatch):
    """One that is shared, and another user's."""

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_module, "_open_whole", forbidden)
    with pytest.raises(ValueError, match=r"be read \(Permission denied\): .* with --data.cache"):
        tokenize([path], tokenizer, reading(tmp_path / "cache"))


def test_strict_is_fatal_from_the_cache_too(path, tokenizer, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match=":8: 'answer' is empty"):
            tokenize([path], tokenizer, reading(tmp_path / "cache", strict=True))


def test_the_list_says_whose_tokens_they_are(path, tokenizer, tmp_path):
    tokenize([path], tokenizer, reading(tmp_path / "cache", chunk=1 << 20))
    whole = json.loads(next(tmp_path.rglob("whole.json")).read_text())
    assert (whole["parts"], whole["file"]) == (1, str(path))
