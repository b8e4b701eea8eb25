"""Files to tokens: everything that was read is a document or a named broken row."""

import dataclasses

import numpy as np
import pytest

from train.data.tokens import encode as encode_module
from train.data.tokens.cache import ReadOptions
from train.data.tokens.dataset import tokenize

GOOD = {"question": "Q", "answer": "A"}


def test_documents_keep_their_order_file_and_line(write, tokenizer):
    a = write("a.jsonl", [{"text": "one"}, {"question": "", "answer": ""}, GOOD])
    b = write("b.json", [{"text": "two"}])
    dataset = tokenize([a, b], tokenizer)
    assert dataset.lengths.tolist() == [4, 24, 4]
    assert dataset.splittable.tolist() == [True, False, True]
    assert dataset.file.tolist() == [0, 0, 1]
    assert dataset.line.tolist() == [1, 3, 2]
    assert dataset.tokens[-4:].tolist() == [~1, *tokenizer.encode("two")]  # <s> is not trained on
    assert dataset.tokens[:].dtype == np.int32
    assert dataset.targets.tolist() == [3, 2, 3]
    assert [(file.rows, file.documents, file.formats) for file in dataset.files] == [
        (3, 2, {"text": 1, "qa": 1}),
        (1, 1, {"text": 1}),
    ]
    assert [str(problem) for problem in dataset.broken] == [f"{a}:2: 'answer' is empty"]


BAD_LINES = b"\n".join(
    [
        b'{"question": "Q", "answer": "A"}',
        b'{"question": "Q", "answer": ',
        b'{"question": "Q", "answer": 4}',
        b'{"question": "Q", "answer": " "}',
        b'{"question": "caf\xe9", "answer": "A"}',
        b'{"question": "Q", "answer": "\\ud800"}',
        b'["Q", "A"]',
        b'{"prompt": "Q"}',
        b'{"messages": [{"role": "wizard", "content": "A"}]}',
        b'{"tokens": []}',
        b'{"tokens": [999]}',
        b'{"tokens": [1, 999]}',
    ]
)


def test_every_kind_of_broken_row_is_counted_with_its_line(write, tokenizer):
    path = write("a.jsonl", BAD_LINES)
    dataset = tokenize([path], tokenizer)
    assert dataset.files[0].rows == 12
    assert dataset.files[0].documents == 1
    assert [problem.line for problem in dataset.broken] == list(range(2, 13))
    assert all("\n" not in str(problem) for problem in dataset.broken)


def test_strict_makes_the_first_broken_row_fatal(write, tokenizer):
    path = write("a.jsonl", BAD_LINES)
    with pytest.raises(ValueError) as error:
        tokenize([path], tokenizer, ReadOptions(strict=True))
    assert str(error.value).startswith(f"{path}:2: not JSON")


def test_a_file_of_broken_rows_is_an_error(write, tokenizer):
    path = write("a.json", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(ValueError, match=r"none of its 2 rows can be used; the first: .*:2: unk"):
        tokenize([write("good.jsonl", [GOOD]), path], tokenizer)


def test_an_empty_array_is_an_error(write, tokenizer):
    with pytest.raises(ValueError, match="holds no rows"):
        tokenize([write("a.json", [])], tokenizer)


def test_text_without_tokens_is_a_broken_row(write, tokenizer):
    class Deaf:
        def __init__(self):
            vars(self).update(dataclasses.asdict(tokenizer), decode=tokenizer.decode)

        def encode(self, text):
            return [] if text == "unheard" else tokenizer.encode(text)

        def encode_batch(self, texts):
            return [self.encode(text) for text in texts]

    path = write("a.jsonl", [{"text": "unheard"}, {"text": "heard"}])
    dataset = tokenize([path], Deaf())
    assert [str(problem) for problem in dataset.broken] == [
        f"{path}:1: the document has no token to predict"
    ]
    assert dataset.lengths.tolist() == [6]


def test_rows_beyond_one_chunk_are_all_there(write, tokenizer, monkeypatch):
    path = write("a.jsonl", [{"text": f"text {i}"} for i in range(100)])
    whole = tokenize([path], tokenizer)
    monkeypatch.setattr(encode_module, "_BATCH", 50)
    chunked = tokenize([path], tokenizer)
    assert np.array_equal(whole.tokens[:], chunked.tokens[:])
    assert whole.digest == chunked.digest
    assert whole.files == chunked.files
    assert np.array_equal(whole.line, chunked.line)


def test_json_of_another_shape_is_told_what_is_wanted(write, tokenizer):
    path = write("a.json", {"data": [{"text": "a"}]})
    with pytest.raises(ValueError, match="a .json file is an array of rows, or has one object a"):
        tokenize([path], tokenizer)
