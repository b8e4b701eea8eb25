"""The report adds up and is readable."""

from train.data.open import open_data
from train.data.tokens.cache import ReadOptions

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
        "1 document (0 split, 0 truncated, 0 dropped, 5 broken), 24 tokens, 2 with loss,"
        " in 1 row of 64 (37.5% full)"
    )
    assert str(report.files[0]) == f"{path}: 6 rows: 1 in the format qa, 5 broken"
    assert report.notes() == [
        f"{path}: 5 broken row(s) skipped, 160 bytes: 5 x 'answer' is empty (line 1, 2, 3, ...)"
    ]


def test_nothing_is_left_out_in_silence(write, tokenizer):
    """Formats, unread keys, answers without loss, broken rows by reason, repeats: a line each."""
    good = {"question": "Q", "answer": "A"}
    rows = [
        *(good, good | {"id": 1}, good | {"id": 2, "meta": {"a": 1}}, good | {"id": None}),
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}]},
        {"conversation": [{"output": "Raw text."}]},
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": "C", "weight": 0},
            ]
        },
        {"question": "Q", "answer": ""},
        {"text": " "},
        {"question": "long " * 40, "answer": "A"},
        {"question": "Q", "answer": "A", "chosen": "x", "rejected": "y"},
    ]
    path = write("a.jsonl", rows)
    report = open_data([path], tokenizer, **PARTS).report
    counts = {"qa": 5, "messages": 1, "pretrain": 1, "sharegpt": 1}
    formats = ", ".join(f"{count} in the format {name}" for name, count in counts.items())
    assert report.lines() == [
        str(report),
        f"{path}: 11 rows: {formats}, 3 broken",
        f"{path}: keys not read: 'id' in 2 row(s), 'meta' in 1 row(s)",
        f"{path}: 1 row(s) without any prompt read as raw text, as XTuner pre-trains",
        f"{path}: 1 answer(s) without loss, as the data ask",
        f"{path}: 3 broken row(s) skipped, 111 bytes: 1 x 'answer' is empty (line 8);"
        " 1 x 'text' is empty (line 9); 1 x a preference row ('chosen' and 'rejected') is not read:"
        " write the chosen answer as 'messages' to train on it (line 11)",
        f"{path}: 2 document(s) dropped: 1 x 223 tokens, a row has 64 (line 10);"
        " 1 x 24 tokens, none is trained on (line 7)",
        f"3 document(s) repeat an earlier one: {path}:2 is {path}:1 again",
    ]
    cached = ReadOptions(cache=path.parent / "cache", workers=1)
    for _ in range(2):  # made, and read from the cache
        assert (
            open_data([path], tokenizer, reading=cached, **PARTS).report.lines() == report.lines()
        )


def test_reasons_that_differ_in_numbers_are_one_kind(write, tokenizer):
    rows = [{"question": "Q " * n, "answer": "A"} for n in range(30, 60)]
    path = write("a.jsonl", [{"text": "fine"}, *rows, *({"text": i} for i in range(9))])
    *_, broken, dropped = open_data([path], tokenizer, **PARTS).report.notes()
    assert broken.endswith(": 9 x 'text' must be a string, this is a number (line 32, 33, 34, ...)")
    assert (
        dropped == f"{path}: 30 document(s) dropped: 30, the first: 83 tokens, a row has 64"
        " (line 2, 3, 4, ...)"
    )


def test_many_reasons_are_counted_and_the_place_of_the_list_is_named(write, tokenizer):
    broken = [{"messages": [{"role": 3 * letter, "content": "Q"}]} for letter in "abcdefgh"]
    path = write("a.jsonl", [{"text": "fine"}, *broken])
    [note] = open_data([path], tokenizer, **PARTS).report.notes()
    assert note.endswith("; 2 for other reasons (train.preview --all)")
