"""Tokens of many files are one sequence, of which a bounded part is mapped."""

from pathlib import Path

import numpy as np

from train.data.tokens import token_array as sequence_module
from train.data.tokens.token_array import OnDisk, Tokens


def mapped(directory: Path) -> int:
    """How many files of a directory this process has mapped."""
    return Path("/proc/self/maps").read_text().count(str(directory))


def test_files_are_read_as_one_and_let_go(tmp_path, monkeypatch):
    """Any stretch, within a file or across all; arrays in memory and empty files among them."""
    monkeypatch.setattr(sequence_module, "MAPPED", 2)
    whole = np.arange(1000, dtype=np.int32)
    arrays = []
    for number, piece in enumerate(np.split(whole, [100, 100, 350, 360, 900])):
        path = tmp_path / f"{number}.tokens"
        path.write_bytes(piece.tobytes() + b"what follows the tokens")
        arrays.append(piece if number == 3 else OnDisk(path, len(piece)))
    tokens = Tokens(arrays)
    assert len(tokens) == 1000
    for start, stop in ((0, 1000), (99, 101), (340, 365), (5, 5), (899, 901), (990, 1000)):
        assert np.array_equal(tokens[start:stop], whole[start:stop])
        assert mapped(tmp_path) <= 2
    assert mapped(tmp_path) == 2
    del tokens
    assert mapped(tmp_path) == 0
