"""Packing a stream: nothing lost by concat; XTuner's Packer exactly, its losses counted."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.open import open_data
from train.data.pack import stream as stream_module
from train.data.pack.mixture import permutation
from train.data.pack.stream import pack_stream

PARTS = dict(batch_size=1, seed=3)


@pytest.fixture
def path(write):
    rows = [{"question": f"Q{i}", "answer": "A" * (i % 37 + 1)} for i in range(60)]
    return write("a.jsonl", [*rows, {"text": "word " * 60}])


def packed(dataset, seq_len: int, method: str, *, seed: int):
    """Every document once."""
    once = np.ones(len(dataset.line), np.int64)
    return pack_stream(dataset, seq_len, once, method=method, seed=seed)


def all_rows(loader):
    return [next(loader) for _ in range(loader.report.rows)]


def test_concat_loses_nothing_and_fills_all_rows_but_one(path, tokenizer):
    """Also the targets across a cut: as many as the documents have by themselves."""
    whole = open_data([path], tokenizer, seq_len=512, **PARTS).report
    with open_data([path], tokenizer, seq_len=50, packing="concat", **PARTS) as loader:
        report, batches = loader.report, all_rows(loader)
    assert (report.documents, report.tokens) == (61, whole.tokens)
    assert report.loss_tokens == whole.loss_tokens == sum(b.loss_mask.sum() for b in batches)
    assert report.dropped == report.truncated == ()
    full = [int((batch.segment_ids > 0).sum()) for batch in batches]
    assert sorted(full)[1:] == [50] * (len(full) - 1)
    for batch in batches:
        starts = np.flatnonzero(np.diff(batch.segment_ids[0], prepend=0) > 0)
        assert (batch.positions[0, starts] == 0).all()


def packer(documents: list[list[int]], size: int, count: int) -> list[list[int]]:
    """XTuner's Packer as its documentation describes it, written independently."""
    residual, rows = [], []
    for at in range(0, len(documents), count):
        tokens = residual + list(chain(*documents[at : at + count]))
        if len(tokens) >= size:
            full = len(tokens) // size * size
            rows += [tokens[i : i + size] for i in range(0, full, size)]
            residual = tokens[full:]
        else:
            rows.append(tokens)
            residual = []
    return rows


@pytest.mark.parametrize("count", [1, 7, 1000])
@pytest.mark.parametrize("seq_len", [50, 200])
def test_xtuner_is_its_packer(path, tokenizer, monkeypatch, count, seq_len):
    monkeypatch.setattr(stream_module, "XTUNER_BATCH", count)
    with open_data([path], tokenizer, seq_len=seq_len, packing="xtuner", **PARTS) as loader:
        data, report = loader._dataset, loader.report
        batches = all_rows(loader)
    signed = [data.tokens[a:b] for a, b in zip(data.offsets, data.offsets[1:], strict=False)]
    documents = [np.where(ids < 0, ~ids, ids)[:seq_len].tolist() for ids in signed]
    expected = packer([documents[i] for i in permutation(61, 3)], seq_len, count)
    rows = [b.tokens[0][b.segment_ids[0] > 0].tolist() for b in batches]
    assert sorted(rows) == sorted(expected)
    assert report.tokens == sum(map(len, expected))
    assert report.loss_tokens == sum(b.loss_mask.sum() for b in batches)
    assert report.documents + len(report.dropped) == 61
    assert report.dropped or report.truncated


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    seq_len=st.integers(2, 80),
)
def test_concat_holds_every_token_once(make_dataset, lengths, seq_len):
    dataset = make_dataset([(length, True) for length in lengths])
    spans, rows = packed(dataset, seq_len, "concat", seed=1)
    found = sorted(zip(spans.start, spans.length, strict=True))
    assert [start for start, _ in found] == [0, *np.cumsum([n for _, n in found])[:-1]]
    assert spans.targets.sum() == dataset.targets.sum()
    held = np.add.reduceat(spans.length, rows.offsets[:-1])
    assert (held[:-1] == seq_len).all() and 0 < held[-1] <= seq_len


def test_only_concat_goes_on_after_a_row(make_dataset):
    """The last token of an XTuner row has no target, also where its document goes on."""
    dataset = make_dataset([(40, True), (30, True)])
    for how in ("concat", "xtuner"):
        spans, _ = packed(dataset, 12, how, seed=0)
        assert spans.continues.any() == (how == "concat")


def test_a_head_with_nothing_to_learn_is_left_out(make_dataset):
    """XTuner keeps the head of a document; this one's answer comes after it."""
    dataset = make_dataset([(30, False), (10, False), (10, False)], learn_from=28)
    spans, _ = packed(dataset, 12, "xtuner", seed=0)
    assert 0 not in spans.document
    assert [str(p) for p in spans.dropped][-1] == "f:1: 30 tokens, none is trained on"


def test_less_than_a_row_is_a_short_row(make_dataset):
    dataset = make_dataset([(10, True)])
    _, rows = packed(dataset, 24, "xtuner", seed=0)
    assert len(rows) == 1
