"""Parts: however small, their rows are those of the whole file; compressed or not."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.files import readers
from train.data.files.readers import ARROW, LONGEST_ROW, PARQUET
from train.data.files.records import (
    BrokenRecord,
    Record,
    read_chunks,
    read_records,
    records_of,
)

ROWS = [{"text": f"row {i}", "more": {"ü": ["a,]}", '"', "\\", i]}} for i in range(40)]


def in_parts(path, size):
    return [row for part in read_chunks(path, size=size) for row in records_of(part)]


@pytest.mark.parametrize("size", [1, 50, 333, 10_000])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "compact.json"])
def test_parts_hold_every_row_and_its_line(write, name, size):
    content = json.dumps(ROWS) if name == "compact.json" else ROWS
    path = write(name, content)
    whole = list(read_records(path))
    assert [row.value for row in whole] == ROWS
    assert in_parts(path, size) == whole
    assert sum(part.size for part in read_chunks(path, size=size)) == path.stat().st_size


@settings(max_examples=100, deadline=None)
@given(
    damage=st.tuples(st.integers(0, 3000), st.sampled_from(list('"{}[],:x'))),
    size=st.integers(1, 2000),
    indent=st.sampled_from([None, 2]),
)
def test_damaged_arrays_are_read_alike_in_parts(tmp_path_factory, damage, size, indent):
    """Whatever character is overwritten: the same rows, broken ones included."""
    text = list(json.dumps(ROWS[:12], indent=indent))
    place, character = damage
    text[1 + place % (len(text) - 1)] = character
    path = tmp_path_factory.mktemp("damaged") / "a.json"
    path.write_text("".join(text))
    assert [without_column(row) for row in in_parts(path, size)] == [
        without_column(row) for row in read_records(path)
    ]


def without_column(row):
    """Drop the column from the reason: it depends on the chunk for an array on one line."""
    if isinstance(row, Record):
        return row
    return row.line, row.reason.split("(")[0]


def test_a_long_text_becomes_documents_that_end_with_lines(write):
    path = write("a.txt", "".join(f"line {i}\n" for i in range(100)))
    rows = in_parts(path, 64)
    assert len(rows) > 5
    assert "".join(row.value["text"] for row in rows) == path.read_text()
    assert all(row.value["text"].startswith(f"line {row.line - 1}\n") for row in rows)


def test_a_line_too_long_to_be_read_is_named_and_passed_over(write, monkeypatch):
    """A 100 MB line costs no more memory than the limit; the lines around it are read."""
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    path = write("a.jsonl", '{"text": "a"}\n{"text": "' + "x" * 5000 + '"}\n{"text": "b"}\n')
    before, long, after = in_parts(path, 100)
    assert isinstance(long, BrokenRecord) and (long.line, long.size) == (2, 5013)
    assert long.reason.startswith("a row of 5,013 bytes, more than")
    assert [row.value for row in (before, after) if isinstance(row, Record)] == [
        {"text": "a"},
        {"text": "b"},
    ]
    assert after.line == 3
    path = write("end.jsonl", '{"text": "' + "x" * 5000)
    assert [type(row) for row in in_parts(path, 100)] == [BrokenRecord]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("place", [0, 3, 9])
@pytest.mark.parametrize("part", [100, 1 << 20])
def test_a_row_too_long_in_an_array_is_named_and_passed_over(
    write, monkeypatch, place, indent, part
):
    """At the beginning, in the middle and at the end; in one chunk or in several."""
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    rows = [{"n": i} for i in range(10)]
    rows[place] = {"text": "x" * 5000}
    path = write("a.json", json.dumps(rows, indent=indent))
    found = in_parts(path, part)
    [long] = [row for row in found if isinstance(row, BrokenRecord)]
    assert [row.value for row in found if isinstance(row, Record)] == [
        row for row in rows if "n" in row
    ]
    assert long.reason.startswith("a row of 5,0")
    if indent:
        assert [row.line for row in found] == [2 + 3 * i for i in range(10)]
    assert sum(each.size for each in read_chunks(path, size=part)) == path.stat().st_size


def test_an_array_broken_in_a_string_costs_no_more_than_its_row(write, monkeypatch):
    """A string that never ends is passed over, and the rows after it are found."""
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    rows = [f'{{"n": {i}}}' for i in range(6)]
    rows[2] = '{"n": "' + "x" * 3000
    for between in (",\n", ", "):
        found = in_parts(write("a.json", "[\n" + between.join(rows) + "\n]"), 50)
        good = [row.value["n"] for row in found if isinstance(row, Record)]
        assert good == ([0, 1, 3, 4, 5] if between == ",\n" else [0, 1, 4, 5])


@pytest.mark.parametrize(
    ("name", "command"),
    [("a.json", "jq -c '.[]' FILE > NEW.jsonl"), ("a.json.gz", "zcat FILE | jq -c")],
)
def test_an_array_too_large_for_the_memory_is_refused_with_the_command(
    write, monkeypatch, name, command
):
    monkeypatch.setattr(readers, "LARGEST_ARRAY", 1000)
    content = json.dumps(ROWS).encode()
    path = write(name, gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match="a JSON array of more than 1,000 bytes") as error:
        list(read_records(path))
    assert command in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_gzip_holds_the_same_rows(write, name):
    plain = write(name, ROWS)
    path = write(f"{name}.gz", gzip.compress(plain.read_bytes()))
    assert in_parts(path, 100) == list(read_records(plain))
    assert sum(part.size for part in read_chunks(path, size=100)) == path.stat().st_size


def test_a_damaged_archive_is_one_clear_error(write):
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    for content in (packed[:-20], b"no gzip", packed[:30] + b"\0\0" + packed[32:]):
        with pytest.raises(ValueError, match=r"a.jsonl.gz cannot be read: "):
            list(read_records(write("a.jsonl.gz", content)))


def test_zstandard_holds_the_same_rows(write):
    zstandard = pytest.importorskip("zstandard")
    plain = write("a.jsonl", ROWS)
    path = write("a.jsonl.zst", zstandard.compress(plain.read_bytes()))
    assert in_parts(path, 100) == list(read_records(plain))
    assert sum(part.size for part in read_chunks(path, size=100)) == path.stat().st_size
    with pytest.raises(ValueError, match="cannot be read"):
        list(read_records(write("b.jsonl.zst", b"no zstandard")))


def test_zstandard_in_frames(write):
    """One after the other, as pzstd and `cat` make them; those to be skipped, too."""
    zstandard = pytest.importorskip("zstandard")
    skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    whole, lines = b"", [json.dumps(row).encode() + b"\n" for row in ROWS]
    for line in lines:
        whole += zstandard.compress(line[:9]) + skipped + zstandard.compress(line[9:])
    assert [row.value for row in in_parts(write("a.jsonl.zst", whole), 100)] == ROWS


def test_zstandard_that_was_cut_off_is_not_taken_for_whole(write):
    """Wherever, but between two frames."""
    zstandard = pytest.importorskip("zstandard")
    frame = zstandard.compress(b'{"text": "a"}\n' * 9)
    for end in set(range(1, 2 * len(frame))) - {len(frame)}:
        with pytest.raises(ValueError, match="a.jsonl.zst cannot be read: it ends in the middle"):
            list(read_records(write("a.jsonl.zst", (frame * 2)[:end])))


def test_a_small_archive_of_much_does_not_fill_the_memory(write):
    """Nothing that is unpacked at once is longer than a row may be."""
    zstandard = pytest.importorskip("zstandard")
    path = write("a.jsonl.zst", zstandard.compress(bytes(1 << 28)))
    with path.open("rb") as raw:
        pieces = readers._frames(path, raw)
        assert max(map(len, pieces)) <= LONGEST_ROW


@pytest.mark.parametrize(
    ("name", "extra"),
    [("a.jsonl.zst", "zstd"), (f"a{PARQUET}", "parquet"), (f"a{ARROW}", "parquet")],
)
def test_a_missing_library_names_its_extra(write, monkeypatch, name, extra):
    def missing(library):
        raise ImportError(library)

    monkeypatch.setattr(readers.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=rf"is not installed: pip install .*\[{extra}\]"):
        list(read_records(write(name, b"x")))
