"""The report adds up and is readable."""

from train.data import open_data

PARTS = dict(seq_len=64, batch_size=1)


def test_every_row_is_accounted_for(write, tokenizer):
    rows = [{"question": "Q", "answer": "A" * n} for n in range(100)]  # 0 is broken, long dropped
    path = write("a.jsonl", [*rows, {"text": "word " * 100}])
    report = open_data([path], tokenizer, **PARTS).report
    assert [p.line for p in report.broken] == [1]
    assert len(report.dropped) > 0
    assert report.truncated == ()
    assert report.documents + len(report.dropped) + len(report.broken) == 101
    assert sum(file.rows for file in report.files) == 101
    assert report.split == 1


def test_tokens_and_loss_are_those_of_the_rows(write, tokenizer):
    path = write("a.jsonl", [{"question": "Q" * n, "answer": "A" * n} for n in range(1, 15)])
    with open_data([path], tokenizer, **PARTS) as loader:
        report = loader.report
        batches = [next(loader) for _ in range(report.rows)]
    held = [int((batch.segment_ids > 0).sum()) for batch in batches]
    assert report.tokens == sum(held)
    assert report.tail == min(held)
    assert report.loss_tokens == sum(batch.loss_mask.sum() for batch in batches)
    assert report.efficiency == sum(held) / (report.rows * 64)
    before = (sum(held) - min(held)) / ((report.rows - 1) * 64)
    assert report.efficiency_before_tail == before > report.efficiency
    said = f"({report.efficiency:.1%} full, {before:.1%} without the emptiest row)"
    assert str(report).endswith(said)


def test_it_reads_in_one_line_each(write, tokenizer):
    broken = [{"question": "Q", "answer": ""}] * 5
    path = write("a.jsonl", [*broken, {"question": "Q", "answer": "A"}])
    report = open_data([path], tokenizer, **PARTS).report
    assert str(report) == (
        "1 documents (0 split, 0 truncated, 0 dropped, 5 broken), 24 tokens, 2 with loss,"
        " in 1 rows of 64 (37.5% full)"
    )
    assert str(report.files[0]) == f"{path}: 6 rows (1 qa, 5 broken)"
    assert report.notes() == [
        f"{path}: 5 broken row(s) skipped: line 1: 'answer' is empty; line 2: 'answer' is empty;"
        " line 3: 'answer' is empty; and 2 more"
    ]
