"""Golden ids of the chat template and of raw text."""

import dataclasses

import numpy as np
import pytest

from train.data.formats import Chat, RowError, Text, Turn
from train.data.template import encode

BOS, END, START = 1, 259, 260


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def test_one_turn_is_exactly_xtuners(tokenizer):
    """<s> once, loss on the answer and <|im_end|> only, a masked newline, no </s>."""
    encoded = encode(Chat((Turn("Hi", "Yo"),)), tokenizer)
    # fmt: off
    assert encoded.tokens.tolist() == [
        1,                                                          # <s>
        260, 120, 118, 104, 117, 13, 75, 108,                       # <|im_start|>user\nHi
        259, 13,                                                    # <|im_end|>\n
        260, 100, 118, 118, 108, 118, 119, 100, 113, 119, 13,       # <|im_start|>assistant\n
        92, 114, 259,                                               # Yo<|im_end|>
        13,                                                         # \n
    ]
    # fmt: on
    assert np.flatnonzero(encoded.trained).tolist() == [22, 23, 24]
    assert encoded.tokens.dtype == np.int32
    assert encoded.trained.dtype == np.bool_


def test_system_text_and_several_turns(tokenizer):
    encoded = encode(
        Chat((Turn("Q1", "A1", "S"), Turn("Q2", "A2", loss=False), Turn("Q3", "A3"))), tokenizer
    )
    newline = ids("\n")

    def user(text):
        return [START, *ids("user\n" + text), END, *newline, START, *ids("assistant\n")]

    expected = [
        ([BOS], 0),
        ([START, *ids("system\nS"), END, *newline], 0),
        (user("Q1"), 0),
        ([*ids("A1"), END], 1),
        (newline, 0),
        (user("Q2"), 0),
        ([*ids("A2"), END], 0),
        (newline, 0),
        (user("Q3"), 0),
        ([*ids("A3"), END], 1),
        (newline, 0),
    ]
    assert encoded.tokens.tolist() == [token for piece, _ in expected for token in piece]
    assert encoded.trained.tolist() == [bool(flag) for piece, flag in expected for _ in piece]


def test_pieces_are_tokenised_one_by_one(tokenizer):
    """A tokenizer that merges across the joins must not see the joins."""
    seen = []

    @dataclasses.dataclass
    class Recorder:
        bos_id, pad_id, im_start_id, im_end_id = 1, 2, START, END

        def encode(self, text):
            seen.append(text)
            return ids(text)

    encode(Chat((Turn("Q", " A "),)), Recorder())
    assert sorted(seen) == sorted(["user\nQ", "\n", "assistant\n", " A "])


def test_chat_tokens_that_a_tokenizer_lacks_are_spelled_out(tokenizer):
    tokenizer.im_start_id = tokenizer.im_end_id = None
    encoded = encode(Chat((Turn("Q", "A"),)), tokenizer)
    text = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert encoded.tokens.tolist() == [BOS, *ids(text)]
    assert encoded.tokens[encoded.trained].tolist() == ids("A<|im_end|>")


def test_raw_text_is_bos_and_the_stripped_text(tokenizer):
    encoded = encode(Text("\n words here \n"), tokenizer)
    assert encoded.tokens.tolist() == [BOS, *ids("words here")]
    assert encoded.trained.tolist() == [False] + [True] * 10


def test_text_without_tokens_is_a_row_error(tokenizer):
    tokenizer.encode = lambda text: []
    with pytest.raises(RowError, match="no tokens"):
        encode(Text("x"), tokenizer)
