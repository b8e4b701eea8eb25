"""Files to raw rows: where rows begin, and that nothing unreadable hides others."""

import os

import pytest

from train.data.files.records import Broken, Row, read_rows
from train.data.files.source import has_document_per_line


def values(path):
    return [row.value for row in read_rows(path) if isinstance(row, Row)]


def broken(path):
    return [(row.line, row.reason) for row in read_rows(path) if isinstance(row, Broken)]


def test_long_unbroken_lines_are_one_document_each(write):
    path = write("wiki.txt", "\n".join(["word " * 200, "other " * 300, "last " * 250]))
    assert [(row.line, row.value["text"][:5]) for row in read_rows(path)] == [
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
    assert [row.line for row in read_rows(write("a.json", ROWS))] == [2, 5, 13]
    assert [row.line for row in read_rows(write("a.jsonl", '\n{"a": 1}\n\n{"a": 2}'))] == [2, 4]


def test_sizes_of_lines_add_up_to_the_file(write):
    path = write("a.jsonl", ROWS)
    assert sum(row.size for row in read_rows(path)) == path.stat().st_size


def test_a_broken_line_is_named_and_the_others_are_read(write):
    path = write("a.jsonl", '{"text": "a"}\n{"text": \n{"text": "b"}\n')
    assert values(path) == [{"text": "a"}, {"text": "b"}]
    assert broken(path) == [(2, "not JSON: Expecting value (column 9)")]


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
    (row,) = read_rows(write("a.jsonl", b'{"text": "' + b"x" * 20_000_000 + b'"}'))
    assert isinstance(row, Row)
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
        list(read_rows(path))
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_a_clear_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe.json is a pipe or a device"):
        list(read_rows(tmp_path / "pipe.json"))
    with pytest.raises(ValueError, match=r"no such data file: .*nowhere.txt"):
        list(read_rows(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="is a directory"):
        list(read_rows(tmp_path))
