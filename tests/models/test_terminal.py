"""Output that any terminal can show."""

import io
import sys

from models.terminal import escape_control, escape_unencodable


def test_escape_sequences_become_visible():
    """C0, DEL and C1 controls; line feeds, tabs and all other characters stay."""
    assert escape_control("a\x1b[31mb\r\x07\x7f\x9b2J") == "a\\x1b[31mb\\x0d\\x07\\x7f\\x9b2J"
    assert escape_control("é\n\t你好 🐉") == "é\n\t你好 🐉"


def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch):
    out = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(out, encoding="gbk", write_through=True))
    escape_unencodable()
    print("你🐉")
    print("é", file=sys.stderr)
    assert out.getvalue() == "你".encode("gbk") + b"\\U0001f409\n" + "é".encode("gbk") + b"\n"
