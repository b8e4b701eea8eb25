"""Tokens of many files are one sequence, of which a bounded part is open."""

import os
from pathlib import Path

import numpy as np
import pytest

from train.data.tokens import token_array as array_module
from train.data.tokens.token_array import TokenArray, TokenFile, stamp


def opened(directory: Path) -> int:
    """Count the files of a directory that this process has open."""
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in numbers()]
    return sum(name.startswith(str(directory)) for name in names)


def numbers() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


def token_file(path: Path, tokens: np.ndarray) -> TokenFile:
    path.write_bytes(tokens.tobytes() + b"the rest of the file")
    with path.open("rb") as file:
        return TokenFile(path, len(tokens), stamp(file.fileno()))


def test_files_are_read_as_one_and_let_go(tmp_path, monkeypatch):
    """Any stretch, within a file or across all; arrays in memory and empty files among them."""
    monkeypatch.setattr(array_module, "OPEN", 2)
    whole = np.arange(1000, dtype=np.int32)
    arrays = []
    for number, piece in enumerate(np.split(whole, [100, 100, 350, 360, 900])):
        path = tmp_path / f"{number}.tokens"
        arrays.append(piece if number == 3 else token_file(path, piece))
    tokens = TokenArray(arrays)
    assert len(tokens) == 1000
    for start, stop in ((0, 1000), (99, 101), (340, 365), (5, 5), (899, 901), (990, 1000)):
        assert np.array_equal(tokens[start:stop], whole[start:stop])
        assert opened(tmp_path) <= 2
    assert opened(tmp_path) == 2
    del tokens
    assert opened(tmp_path) == 0


@pytest.mark.parametrize("change", ["cut off", "overwritten", "longer"])
def test_a_file_that_changes_while_it_is_used_is_one_clear_error(tmp_path, change):
    """Not the loss of other tokens, and not SIGBUS, as of a mapped file."""
    path = tmp_path / "a.tokens"
    tokens = TokenArray([token_file(path, np.arange(100_000, dtype=np.int32))])
    assert tokens[5:7].tolist() == [5, 6]
    content = path.read_bytes()
    path.write_bytes(
        {"cut off": content[:9], "longer": content + b"x"}.get(change, b"\1" + content[1:])
    )
    with pytest.raises(ValueError, match=r"a.tokens was changed while it was used: start again"):
        tokens[99_000:99_010]


def test_a_file_that_is_replaced_or_removed_is_read_to_its_end(tmp_path):
    """Another run may mend the cache: what was checked stays, as long as it is open."""
    path = tmp_path / "a.tokens"
    tokens = TokenArray([token_file(path, np.arange(9, dtype=np.int32))])
    assert tokens[0:1].tolist() == [0]
    (tmp_path / "b").write_bytes(b"other")
    (tmp_path / "b").replace(path)
    assert tokens[5:7].tolist() == [5, 6]
    path.unlink()
    assert tokens[7:9].tolist() == [7, 8]
