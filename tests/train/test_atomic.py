"""A file has its name only when it is whole; what was there before stays until then."""

import errno
import re

import pytest

from train.atomic import atomic_write, replace_text


def test_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "config.json"
    replace_text(path, "old")
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_half_way_leaves_the_old_one_and_says_which_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("old")
    message = f"^cannot write {re.escape(str(path))}: No space left on device$"
    with pytest.raises(OSError, match=message), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_another_kind_passes(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
