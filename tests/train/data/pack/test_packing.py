"""Packing neither loses, repeats nor reorders a token, and targets and losses survive it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.pack.packing import PackedRows, fill, pack
from train.data.pack.spans import split_documents
from train.data.tokens.dataset import Dataset

PAD = 0


def ids_of(dataset: Dataset, start: int = 0, stop: int | None = None) -> list[int]:
    signed = dataset.tokens[start:stop]
    return np.where(signed < 0, ~signed, signed).tolist()


documents = st.lists(st.tuples(st.integers(2, 60), st.booleans()), min_size=1, max_size=60)
SEQ_LEN = 24


def once(dataset: Dataset) -> np.ndarray:
    return np.ones(len(dataset.line), np.int64)


def packed(dataset, *, seq_len=SEQ_LEN, too_long="drop", seed=0, window=7):
    spans = split_documents(dataset, seq_len, once(dataset), too_long=too_long)
    rows = pack(spans.length, seq_len, seed=seed, window=window)
    batch = fill(dataset, spans, rows, np.arange(len(rows)), seq_len=seq_len, pad_id=PAD)
    return spans, rows, batch


def usable(docs: list[tuple[int, bool]]) -> list[int]:
    return [i for i, (length, flag) in enumerate(docs) if flag or length <= SEQ_LEN]


@settings(max_examples=150, deadline=None)
@given(docs=documents, seed=st.integers(0, 99), window=st.integers(1, 70))
def test_every_token_is_in_one_place_or_its_document_is_listed(make_dataset, docs, seed, window):
    dataset = make_dataset(docs)
    kept = usable(docs)
    if not kept:
        with pytest.raises(ValueError, match="can be trained on"):
            split_documents(dataset, SEQ_LEN, once(dataset))
        return
    spans, _, batch = packed(dataset, seed=seed, window=window)
    expected = Counter(
        t for i in kept for t in ids_of(dataset, dataset.offsets[i], dataset.offsets[i + 1])
    )
    assert Counter(batch.tokens[batch.segment_ids > 0].tolist()) == expected
    assert (batch.tokens[batch.segment_ids == 0] == PAD).all()
    dropped = {problem.line - 1 for problem in spans.dropped}
    assert dropped == set(range(len(docs))) - set(kept)


@settings(max_examples=150, deadline=None)
@given(docs=documents, seed=st.integers(0, 99))
def test_segments_are_whole_documents_in_order(make_dataset, docs, seed):
    """Chats in one segment; texts in consecutive segments, each full but the last."""
    dataset = make_dataset(docs)
    kept = usable(docs)
    if not kept:
        return
    _, _, batch = packed(dataset, seed=seed)
    segments = {}
    for tokens, ids, positions in zip(
        batch.tokens, batch.segment_ids, batch.positions, strict=True
    ):
        assert (np.diff(ids[ids > 0]) >= 0).all()  # numbered in order, padding last
        assert (ids[np.argmin(ids > 0) :] == 0).all() or (ids > 0).all()
        assert ids.max() == len(set(ids[ids > 0].tolist()))
        for number in range(1, ids.max() + 1):
            at = np.flatnonzero(ids == number)
            assert positions[at].tolist() == list(range(len(at)))
            assert (np.diff(tokens[at]) == 1).all()
            segments[int(tokens[at[0]])] = len(at)
    for i in kept:
        first, length = int(dataset.offsets[i]) + 1, docs[i][0]
        starts = range(first, first + length, SEQ_LEN)
        assert [segments.pop(s) for s in starts] == [
            min(SEQ_LEN, first + length - s) for s in starts
        ]
    assert not segments


@settings(max_examples=150, deadline=None)
@given(docs=documents, too_long=st.sampled_from(["drop", "head", "tail"]))
def test_targets_and_losses_are_those_of_the_uncut_document(make_dataset, docs, too_long):
    dataset = make_dataset(docs)
    if too_long == "drop" and not usable(docs):
        return
    spans, _, batch = packed(dataset, too_long=too_long)
    last = set((dataset.offsets[1:]).tolist())  # token value of each document's last token
    signed = dataset.tokens[:]
    here = batch.segment_ids > 0
    fields = (batch.tokens[here], batch.targets[here], batch.loss_mask[here])
    for token, target, loss in zip(*fields, strict=True):
        if int(token) in last:
            assert (target, loss) == (PAD, 0)
        else:
            assert target == token + 1
            assert loss == (signed[token] >= 0)  # index `token` is the token after it
    assert (batch.targets[~here] == PAD).all()
    assert (batch.loss_mask[~here] == 0).all()
    assert batch.loss_mask.sum() == spans.targets.sum()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200), window=st.integers(1, 300))
def test_rows_hold_every_piece_once_and_never_too_much(lengths, window):
    rows = pack(np.array(lengths, np.int64), 50, seed=1, window=window)
    assert sorted(rows.spans.tolist()) == list(range(len(lengths)))
    for spans in np.split(rows.spans, rows.offsets[1:-1]):
        assert 0 < sum(lengths[span] for span in spans) <= 50


def test_over_long_chats_are_treated_as_chosen_and_named(make_dataset):
    dataset = make_dataset([(30, False), (10, False)])
    spans, _, batch = packed(dataset, too_long="drop")
    assert [str(p) for p in spans.dropped] == ["f:1: 30 tokens, a row has 24"]
    assert spans.truncated == ()
    for too_long, first in (("head", 1), ("tail", 7)):
        spans, _, batch = packed(dataset, too_long=too_long)
        assert spans.dropped == ()
        assert [str(p) for p in spans.truncated] == [f"f:1: 30 tokens, the {too_long} is kept"]
        assert (batch.segment_ids > 0).sum() == 34
        assert set(range(first, first + 24)) <= set(batch.tokens.flatten().tolist())


def test_a_chat_whose_answer_is_cut_off_is_dropped(make_dataset):
    dataset = make_dataset([(30, False), (10, False)], learn_from=28)
    spans, _, _ = packed(dataset, too_long="head")
    assert [str(p) for p in spans.dropped] == ["f:1: 30 tokens, none is trained on"]
    assert spans.truncated == ()


def test_what_is_not_taken_is_not_named(make_dataset):
    """A document that a weight leaves out is neither dropped nor truncated."""
    dataset = make_dataset([(30, False), (9, False), (10, True), (8, True)], learn_from=40)
    repeats = np.array([0, 0, 1, 1])
    for too_long in ("drop", "head"):
        spans = split_documents(dataset, SEQ_LEN, repeats, too_long=too_long)
        assert spans.dropped == spans.truncated == ()


def test_nothing_to_learn_is_said(make_dataset):
    dataset = make_dataset([(10, False), (9, False)], learn_from=99)
    with pytest.raises(ValueError, match="none of the 2 documents has a token that is trained on"):
        split_documents(dataset, SEQ_LEN, once(dataset))


def test_packing_depends_on_the_seed_alone():
    lengths = np.random.default_rng(0).integers(1, 100, 500)

    def plan(seed) -> PackedRows:
        return pack(lengths, 100, seed=seed)

    assert np.array_equal(plan(3).spans, plan(3).spans)
    assert not np.array_equal(plan(3).spans, plan(4).spans)


@pytest.mark.parametrize("window", [1_000, 20_000])
def test_rows_are_full_but_the_last(window):
    """Alpaca-like lengths; a window's remainder goes into the next one and is not lost."""
    lengths = np.minimum(np.random.default_rng(0).gamma(2.0, 90, 20_000).astype(np.int64) + 12, 605)
    for seq_len, least in ((4_096, 0.995), (32_768, 0.998)):
        rows = pack(lengths, seq_len, seed=0, window=window)
        held = np.add.reduceat(lengths[rows.spans], rows.offsets[:-1])
        assert np.delete(held, held.argmin()).mean() / seq_len > least


# The lengths of a file of 999 Alpaca rows with InternLM2's tokenizer, each twentieth of them.
ALPACA = (26, 36, 42, 46, 52, 58, 66, 84, 101, 119, 140, 159, 183, 211, 245, 278, 311, 343, 380)
ALPACA += (420, 604)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_file_fills_its_rows_but_the_last(seed):
    """As 999 Alpaca rows do, and all rows together as far as so few tokens can."""
    at = np.random.default_rng(seed).uniform(0, 20, 999)
    lengths = np.interp(at, range(21), ALPACA).astype(np.int64)
    for seq_len, least in ((4_096, 0.98), (32_768, 0.995)):
        rows = pack(lengths, seq_len, seed=seed)
        held = np.add.reduceat(lengths[rows.spans], rows.offsets[:-1])
        assert np.delete(held, held.argmin()).mean() / seq_len >= least
        assert len(rows) == -(-lengths.sum() // seq_len)  # no packing has fewer


def test_an_exact_fit_is_taken():
    rows = pack(np.array([60, 50, 50, 40]), 100, seed=0)
    assert len(rows) == 2
