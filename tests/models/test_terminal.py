"""Output that any terminal can show."""

import io
import subprocess
import sys

from models.terminal import escape_control, set_up_streams


def test_escape_sequences_become_visible():
    """C0, DEL and C1 controls; line feeds, tabs and all other characters stay."""
    assert escape_control("a\x1b[31mb\r\x07\x7f\x9b2J") == "a\\x1b[31mb\\x0d\\x07\\x7f\\x9b2J"
    assert escape_control("é\n\t你好 🐉") == "é\n\t你好 🐉"


def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch):
    out = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(out, encoding="gbk", write_through=True))
    set_up_streams()
    print("你🐉")
    print("é", file=sys.stderr)
    assert out.getvalue() == "你".encode("gbk") + b"\\U0001f409\n" + "é".encode("gbk") + b"\n"


def test_streams_that_were_closed_write_to_nowhere(tmp_path):
    """A file that is opened later does not get their descriptors, and so no output of others."""
    code = (
        "import os, sys; from models.terminal import set_up_streams; set_up_streams();"
        "print('out'); print('err', file=sys.stderr); file = open(sys.argv[1], 'w');"
        "file.write(str(file.fileno())); os.write(1, b'c'); os.write(2, b'c++')"
    )
    file = tmp_path / "file"
    closed = ["bash", "-c", 'exec "$0" -c "$1" "$2" >&- 2>&- <&-', sys.executable, code, str(file)]
    assert subprocess.run(closed).returncode == 0
    assert int(file.read_text()) > 2
