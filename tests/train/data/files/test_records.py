"""Files to raw rows: where rows begin, and that nothing unreadable hides others."""

import json
import os

import pytest

from train.data.files.readers import has_document_per_line
from train.data.files.records import BrokenRecord, Record, read_records


def values(path):
    return [row.value for row in read_records(path) if isinstance(row, Record)]


def broken(path):
    return [(row.line, row.reason) for row in read_records(path) if isinstance(row, BrokenRecord)]


def test_long_unbroken_lines_are_one_document_each(write):
    path = write("wiki.txt", "\n".join(["word " * 200, "other " * 300, "last " * 250]))
    assert [(row.line, row.value["text"][:5]) for row in read_records(path)] == [
        (1, "word "),
        (2, "other"),
        (3, "last "),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "To be,\nor not to be.\n",  # verse: short lines
        "paragraph " * 200 + "\n\n" + "another " * 200,  # long paragraphs with blank lines between
    ],
)
def test_short_or_blank_separated_lines_are_one_document(write, text):
    assert values(write("play.txt", text)) == [{"text": text}]


def test_division_of_text_is_judged_by_the_mean_line():
    assert has_document_per_line(b"x" * 2000 + b"\nshort\n")
    assert not has_document_per_line(b"x" * 600 + b"\nshort" * 5)


ROWS = [{"text": "a"}, {"text": "b", "n": {"m": [1]}}, {"text": "ü"}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_array_and_lines_hold_the_same_rows(write, name):
    assert values(write(name, ROWS)) == ROWS


def test_the_content_decides_between_array_and_lines(write):
    assert values(write("lines.json", '{"text": "a"}\r\n\r\n{"text": "b"}')) == ROWS[:1] + [
        {"text": "b"}
    ]
    assert values(write("array.jsonl", '  [{"text": "a"}]\n')) == ROWS[:1]
    assert values(write("bom.json", b'\xef\xbb\xbf[{"text": "a"}]')) == ROWS[:1]
    assert values(write("bom.jsonl", b'\xef\xbb\xbf{"text": "a"}')) == ROWS[:1]


def test_rows_carry_the_line_on_which_they_begin(write):
    assert [row.line for row in read_records(write("a.json", ROWS))] == [2, 5, 13]
    assert [row.line for row in read_records(write("a.jsonl", '\n{"a": 1}\n\n{"a": 2}'))] == [2, 4]


def test_sizes_of_lines_add_up_to_the_file(write):
    path = write("a.jsonl", ROWS)
    assert sum(row.size for row in read_records(path)) == path.stat().st_size


def test_a_broken_line_is_named_and_the_others_are_read(write):
    path = write("a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n')
    assert values(path) == [{"text": "a"}, {"text": "b"}]
    assert broken(path) == [(2, "not JSON: Expecting value (column 9)")]


def test_a_second_row_on_a_line_is_named(write):
    path = write("a.jsonl", '{"text": "a"}{"text": "b"}\n{"text": "c"},\n{"text": "d"}\n')
    assert values(path) == [{"text": "d"}]
    reason = "not JSON: text after the end of the row (column 14)"
    assert broken(path) == [(1, reason), (2, reason)]


def test_an_indented_array_goes_on_after_a_broken_row(write):
    path = write("a.json", ROWS)
    damaged = path.read_text().replace('"text": "b"', '"text: "b"')
    assert values(write("b.json", damaged)) == [ROWS[0], ROWS[2]]
    ((line, reason),) = broken(write("b.json", damaged))
    assert line == 5
    assert reason == "not JSON: Expecting ':' delimiter (line 6 column 13)"


def test_an_array_on_one_line_goes_on_after_a_broken_row(write):
    path = write("a.json", '[{"text": "a"}, {"text" "b"}, {"text": "c"}]')
    assert values(path) == [{"text": "a"}, {"text": "c"}]
    assert len(broken(path)) == 1


@pytest.mark.parametrize(
    ("text", "count", "reason"),
    [
        ('[\n{"text": "a"},\n{"text": "b"', 1, "delimiter"),
        ('[\n{"text": "a"},\n', 1, "Expecting value"),
        ('[\n{"text": "a"}', 0, "no ',' or ']' after the row"),
        ('[\n{"text": "a"}\n]\n{"text": "b"}', 1, "text after the end of the array"),
    ],
)
def test_an_array_that_does_not_end_well_is_reported(write, text, count, reason):
    path = write("a.json", text)
    assert len(values(path)) == count
    assert [reason in found for _, found in broken(path)] == [True]


def test_nesting_too_deep_to_parse_is_a_broken_row(write):
    deep = "[" * 200_000
    assert [line for line, _ in broken(write("a.jsonl", f'{{"a": 1}}\n{deep}\n'))] == [2]


def test_text_that_is_not_utf8_names_the_line(write):
    path = write("a.txt", b"fine\nna\xefve\n")
    assert broken(path) == [(2, "byte 0xef is not UTF-8")]


def test_a_line_of_many_megabytes_is_one_row(write):
    (row,) = read_records(write("a.jsonl", b'{"text": "' + b"x" * 20_000_000 + b'"}'))
    assert isinstance(row, Record)
    assert row.size == 20_000_012


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.json", b"\xef\xbb\xbf", "is empty"),
        (
            "a.csv",
            "a,b",
            "unknown kind of file '.csv' (known: .txt, .json, .jsonl, .parquet, .arrow; ",
        ),
    ],
)
def test_files_without_rows_are_one_clear_error(write, name, content, message):
    path = write(name, content)
    with pytest.raises(ValueError) as error:
        list(read_records(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_a_clear_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe.json is a pipe or a device"):
        list(read_records(tmp_path / "pipe.json"))
    with pytest.raises(ValueError, match=r"no such data file: .*nowhere.txt"):
        list(read_records(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match=r"no such data file: .*\*.txt: it is a pattern, which"):
        list(read_records(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match=r"is a directory: name its data files, as --data .*jsonl"):
        list(read_records(tmp_path))


def test_several_arrays_in_one_file_are_all_read(write):
    """Files that were joined, with a byte order mark or a comma between them."""
    first, second = json.dumps(ROWS[:2]), json.dumps(ROWS[2:], indent=1)
    for between in ("", "\n", "\n\ufeff", ", ", " \ufeff\n"):
        path = write("a.json", "\ufeff" + first + between + second)
        assert values(path) == ROWS
        assert broken(path) == []


def test_rows_that_are_left_out_are_counted_in_bytes(write):
    """The half of a file must not look like one broken row."""
    rest = '{"text": "b"}\n' * 500
    [_, left_out] = read_records(write("a.json", '[{"text": "a"}]\n' + rest))
    assert isinstance(left_out, BrokenRecord)
    assert (left_out.line, left_out.size) == (2, len(rest))


@pytest.mark.parametrize("name", ["a.jsonl", "articles.txt", "play.txt"])
def test_a_byte_order_mark_inside_is_read(write, name):
    """At the beginning of any line, where a file was appended to another."""
    texts = {"a.jsonl": '{"text": "a"}', "articles.txt": "word " * 120, "play.txt": "short line"}
    text = texts[name]
    marked = write(name, f"\ufeff{text}\n\ufeff{text}\n  \ufeff{text}\n")
    expected = write("plain" + name, f"{text}\n{text}\n{text}\n")
    if name == "play.txt":
        marked = write(name, f"\ufeff{text}\n\ufeff{text}\n\ufeff{text}\n")
    assert values(marked) == values(expected)
    assert broken(marked) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(write, name, encoding):
    """With the command that converts the file."""
    content = '[{"text": "a"}]' if name == "a.json" else '{"text": "a"}\n' * 3
    with pytest.raises(ValueError) as error:
        list(read_records(write(name, content.encode(encoding))))
    named = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert f"{name} is {named}, not UTF-8: convert it with iconv -f {named} -t" in str(error.value)


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet", "a.arrow"]
)
def test_a_pointer_of_git_lfs_is_named(write, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14\n"
    with pytest.raises(ValueError, match="a Git LFS pointer, not the file itself"):
        list(read_records(write(name, pointer)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("magic", "packing"),
    [(b"\x1f\x8b\x08", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip")],
)
def test_a_compressed_file_without_the_suffix_is_named(write, name, magic, packing):
    with pytest.raises(ValueError, match=f"{name} is compressed with {packing}: unpack it"):
        list(read_records(write(name, magic + bytes(50))))
