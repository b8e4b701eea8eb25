"""Weights and held-out documents: what an epoch holds, and what validation does."""

from pathlib import Path

import numpy as np
import pytest

from train.data.open import open_data
from train.data.pack.mixture import parse_source, permutation

PARTS = dict(seq_len=64, batch_size=4)


@pytest.fixture
def paths(write):
    a = write("a.jsonl", [{"text": f"first {i}"} for i in range(100)])
    b = write("b.jsonl", [{"text": f"second {i}"} for i in range(40)])
    return str(a), str(b)


def texts(loader, tokenizer) -> list[str]:
    found = []
    for batch in loader.one_epoch():
        for tokens, ids, mask in zip(batch.tokens, batch.segment_ids, batch.loss_mask, strict=True):
            if mask.any():
                numbers = range(1, ids.max() + 1)
                found += [
                    tokenizer.decode(tokens[ids == n].tolist(), skip_special=True) for n in numbers
                ]
    return sorted(found)


def test_sources_as_people_type_them(tmp_path):
    plain, named = Path("a.json"), Path("c:a.json")
    assert parse_source("a.json") == ("a.json", plain, [plain], 1.0)
    assert parse_source("a.json:0.3") == ("a.json:0.3", plain, [plain], 0.3)
    assert parse_source("c:a.json")[1:] == (named, [named], 1.0)
    assert parse_source("val.jsonl:0.5").path.stem == "val"  # the name of a validation set
    (tmp_path / "a:2").write_text("")
    assert parse_source(tmp_path / "a:2")[1:] == (tmp_path / "a:2", [tmp_path / "a:2"], 1.0)
    for weight in ("0", "-1", "nan", "inf", "1001", "1e12", "1e300"):
        with pytest.raises(ValueError, match="the weight must be above 0 and at most 1,000"):
            parse_source(f"a.json:{weight}")


@pytest.mark.parametrize("method", ["fit", "concat"])
def test_every_token_has_the_source_of_its_document(write, tokenizer, method):
    """In mixed rows; a file that is named twice is one source, and a single file has none."""
    files = [
        write("a.jsonl", [{"text": "a" * 9}] * 40),
        write("b.jsonl", [{"text": "b" * 40}] * 40),
    ]
    names = [str(files[0]), f"{files[1]}:2", f"{files[0]}:0.5"]
    with open_data(names, tokenizer, packing=method, **PARTS) as loader:
        batches = list(loader.one_epoch())
    tokens, sources = (np.concatenate([b[i] for b in batches]) for i in (0, 5))
    assert loader.sources == tuple(map(str, files)) and sources.dtype == np.uint8
    for source, letter in enumerate("ab"):
        [token] = tokenizer.encode(letter)
        assert set(sources[tokens == token]) == {source}
    assert any(set(tokenizer.encode("ab")) <= set(row) for row in tokens)
    with open_data(names[:1], tokenizer, **PARTS) as loader:
        assert next(loader).sources is None


@pytest.mark.parametrize("weight", [0.3, 0.01])
def test_a_weight_that_takes_no_document_is_refused(paths, write, tokenizer, weight):
    """The file would be left out without a word."""
    one = write("one.txt", "a text is one document")
    with pytest.raises(ValueError, match=r"one.txt:0.* holds none of its 1 document\(s\): .* 1$"):
        open_data([paths[0], f"{one}:{weight}"], tokenizer, **PARTS)
    open_data([f"{paths[0]}:0.01"], tokenizer, **PARTS).close()
    with pytest.raises(ValueError, match=r"b.jsonl:0.01 holds none .* must be at least 0.025"):
        open_data([f"{paths[1]}:0.01"], tokenizer, **PARTS)


def test_weights_repeat_and_choose(paths, tokenizer):
    a, b = paths
    with open_data([f"{a}:0.3", f"{b}:2.5"], tokenizer, **PARTS) as loader:
        report, held = loader.report, texts(loader, tokenizer)
    firsts = [text for text in held if text.startswith("first")]
    assert len(firsts) == len(set(firsts)) == 30
    counts = [held.count(f"second {i}") for i in range(40)]
    assert sorted(set(counts)) == [2, 3] and sum(counts) == 100
    assert (report.documents, report.left_out, report.split) == (70, 70, 0)
    assert "70 left out" in str(report)


def test_validation_and_training_share_no_document(paths, tokenizer):
    with (
        open_data(paths, tokenizer, hold_out=0.1, **PARTS) as train,
        open_data(paths, tokenizer, hold_out=0.1, split="val", **PARTS) as val,
    ):
        learned, held = texts(train, tokenizer), texts(val, tokenizer)
    assert (len(learned), len(held)) == (126, 14)
    assert not set(learned) & set(held)
    assert sum(text.startswith("first") for text in held) == 10


def test_what_is_held_out_has_no_weight_and_is_chosen_in_each_file_anew(write, tokenizer):
    same = [{"text": f"text {i:02}"} for i in range(40)]
    a, b = write("a.jsonl", same), write("b.jsonl", same)
    held = []
    for sources in ([a], [f"{a}:3"], [a, b]):
        with open_data(sources, tokenizer, hold_out=0.5, split="val", **PARTS) as val:
            held.append(texts(val, tokenizer))
    assert held[0] == held[1] and len(held[2]) == 40
    assert held[2] != sorted(held[0] * 2)


def test_a_share_of_a_file_that_is_named_twice_is_refused(paths, tokenizer):
    """Documents held out of one source would be trained on in the other."""
    a, b = paths
    link = Path(a).with_name("link.jsonl")
    link.symlink_to(a)
    for again in (a, f"{a}:2", str(link)):
        for split in ("train", "val"):
            with pytest.raises(ValueError, match=r"a.jsonl is named twice, .*: name it once, and"):
                open_data([a, b, again], tokenizer, hold_out=0.1, split=split, **PARTS)
        open_data([a, b, again], tokenizer, **PARTS).close()


def test_once_is_every_row_once(paths, tokenizer):
    with open_data(paths, tokenizer, **PARTS | {"batch_size": 3}) as loader:
        loss = sum(batch.loss_mask.sum() for batch in loader.one_epoch())
        assert loader.report.rows % 4 and loss == loader.report.loss_tokens
        assert loader.state()["row"] == 0


def test_too_few_documents_to_hold_some_out(write, tokenizer):
    path = write("a.jsonl", [{"text": "only one"}])
    with pytest.raises(ValueError, match="leaves none for val"):
        open_data([path], tokenizer, hold_out=0.1, split="val", **PARTS)


def test_known_orders_do_not_change():
    """A change here breaks the resumption of every run there is."""
    assert permutation(8, 0).tolist() == GOLDEN_0
    assert permutation(8, 0, 1, 5).tolist() == GOLDEN_0_1_5


def test_every_number_is_there_once():
    assert np.array_equal(np.sort(permutation(1000, 3)), np.arange(1000))
    assert permutation(0, 1).tolist() == []


def test_keys_give_different_orders():
    assert permutation(100, 1).tolist() != permutation(100, 2).tolist()
    assert permutation(100, 1, 1, 0).tolist() != permutation(100, 1, 1, 1).tolist()


GOLDEN_0 = [3, 2, 1, 6, 0, 7, 4, 5]
GOLDEN_0_1_5 = [1, 6, 3, 0, 2, 7, 4, 5]
