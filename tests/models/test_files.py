"""Files that a user names are checked before they are read."""

import os

import pytest

from models.files import check_file, read_json

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1477754\n"


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"name": "é"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"name": "é"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must contain a JSON object, not a list"),
        ('"x"', "must contain a JSON object, not a str"),
        ("null", "must contain a JSON object, not a NoneType"),
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "is not valid JSON"),
        ("\udcff", "is not valid JSON: 'utf-8' codec"),
        (LFS, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    ],
)
def test_other_contents_are_one_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_regular_file_is_refused(tmp_path):
    """A FIFO, which nobody writes to, would be waited for without end."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            check_file(path)
    with pytest.raises(FileNotFoundError, match="nothing is missing"):
        check_file(tmp_path / "nothing")
