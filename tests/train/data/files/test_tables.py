"""Tables: Parquet and Arrow files, and the directories that the datasets library saves."""

import json

import pytest

from train.data.files import tables
from train.data.files.formats import recognize
from train.data.files.records import (
    BrokenRecord,
    Record,
    read_chunks,
    read_records,
    records_of,
)
from train.data.files.tables import arrow_files
from train.data.open import open_data

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"question": f"Q{i}", "answer": "ü" * (i % 9 + 1)} for i in range(2500)]


@pytest.fixture
def save(tmp_path):
    """Save rows as a .parquet file, an .arrow file, or a directory of `save_to_disk`."""

    def save_as(kind: str, rows: list, name: str = "a"):
        table = pyarrow.Table.from_pylist(rows)
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=700)
        elif kind == "arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=300)
        else:
            path.mkdir()
            names = []
            for at in range(0, len(rows), 1000):
                names.append(f"data-{len(names):05}-of-00003.arrow")
                piece = table.slice(at, 1000)
                with pyarrow.ipc.new_stream(path / names[-1], table.schema) as stream:
                    stream.write_table(piece)
            files = [{"filename": name} for name in names]
            (path / "state.json").write_text(json.dumps({"_data_files": files}))
            (path / "dataset_info.json").write_text("{}")
        return path

    return save_as


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("part", [1, 5000, 4 << 20])
def test_a_table_holds_its_rows_and_their_numbers(save, kind, part):
    path = save(kind, ROWS)
    parts = list(read_chunks(path, size=part))
    read = [row for each in parts for row in records_of(each)]
    assert [row.value for row in read] == ROWS
    assert [row.line for row in read] == list(range(1, 2501))
    assert len(parts) > {1: 2000, 5000: 10}.get(part, 0)
    assert 0.7 < sum(each.size for each in parts) / path.stat().st_size <= 1


def test_both_formats_of_arrow_are_read(tmp_path):
    """The stream, which `datasets` writes, and the file, which is also called Feather."""
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=300)
    assert [row.value for row in read_records(tmp_path / "a.arrow")] == ROWS


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_table_is_one_clear_error(save, write, kind):
    whole = save(kind, ROWS).read_bytes()
    for content in (b"PAR1 is no table", b"", whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match=rf"b\.{kind} cannot be read: ") as error:
            list(read_records(write(f"b.{kind}", content)))
        assert "\n" not in str(error.value)


def test_a_row_too_long_is_named_and_passed_over(save, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_ROW", 1000)
    path = save("parquet", [{"text": "a"}, {"text": "x" * 5000}, {"text": "b"}])
    before, long, after = read_records(path)
    assert isinstance(long, BrokenRecord) and (long.line, after.line) == (2, 3)
    assert isinstance(before, Record) and after.value == {"text": "b"}


def test_a_saved_dataset_is_its_files(save, tokenizer):
    """The batches of a directory are those of its files, and also of the same rows as Parquet."""
    directory = save("dataset", ROWS)
    files = arrow_files(directory)
    assert [file.name for file in files] == [f"data-{i:05}-of-00003.arrow" for i in range(3)]
    options = dict(seq_len=256, batch_size=2)
    with (
        open_data([f"{directory}:1"], tokenizer, **options) as whole,
        open_data(files, tokenizer, **options) as apart,
        open_data([save("parquet", ROWS)], tokenizer, **options) as one,
    ):
        assert whole.report.documents == one.report.documents == 2500
        for _ in range(5):
            batches = [next(loader).tokens.tobytes() for loader in (whole, apart, one)]
            assert len(set(batches)) == 1


def test_a_weight_and_a_share_are_of_a_whole_directory(save, tokenizer):
    """Also where each of its files is too small for one document of it."""
    directory = save("dataset", ROWS)
    table = pyarrow.table({"text": ["a", "b"]})
    for file in arrow_files(directory):
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    options = dict(seq_len=64, batch_size=1)
    with open_data([f"{directory}:0.2"], tokenizer, **options) as loader:
        assert loader.report.documents == 1
    with open_data([directory], tokenizer, hold_out=0.2, split="val", **options) as loader:
        assert loader.report.documents == 1


def test_a_dataset_with_splits_or_of_another_kind_is_one_clear_error(save, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    save("dataset", ROWS).rename(both / "train")
    (both / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for path, message in (
        (both, r"has several splits \(train\): name one of them"),
        (tmp_path, "not one that the datasets library saved"),
    ):
        with pytest.raises(ValueError, match=message):
            arrow_files(path)
    assert len(arrow_files(both / "train")) == 3
    (both / "train" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="does not list data files"):
        arrow_files(both / "train")


def test_null_is_a_field_that_is_not_there(save):
    """Tables have the same fields in every row."""
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss": False}]
    path = save("parquet", [{"messages": said}, {"messages": [said[0], {**said[1], "loss": None}]}])
    turns = [recognize(row.value).example.messages for row in read_records(path)]
    assert [chat[1].trained for chat in turns] == [False, True]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_column_of_bytes_is_text(save, tokenizer, kind):
    """As writers leave it that do not say that it is UTF-8; what is not is a broken row."""
    texts = ["plain", 'ü "quoted"\n\x00', "a\u2028b"]
    path = save(kind, [{"text": text.encode()} for text in texts] + [{"text": b"caf\xe9"}])
    assert [row.value["text"] for row in read_records(path)][:3] == texts
    with open_data([path], tokenizer, seq_len=64, batch_size=1) as loader:
        [broken] = loader.report.broken
    assert str(broken) == f"{path}:4: 'text' is not UTF-8: byte 0xe9 at character 3"


def test_the_library_itself_saves_what_is_read(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=3)
    read = [row.value for file in arrow_files(tmp_path / "saved") for row in read_records(file)]
    assert read == ROWS
