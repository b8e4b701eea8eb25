"""Golden ids of the chat template and of raw text."""

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from models.tokenizer import load_tokenizer
from train.data.files.examples import Chat, Example, Ids, Message, Text
from train.data.files.formats import recognize
from train.data.files.template import MissingTokens, encode, render

BOS, END, START = 1, 263, 264


def chat(*turns: tuple) -> Chat:
    """Make a chat of (user, answer, system, trained), the last two optional."""
    messages = []
    for user, said, *more in turns:
        system, trained = (*more, *("", True)[len(more) :])
        messages += [Message("system", system)] * bool(system)
        messages += [Message("user", user)] * bool(user)
        messages.append(Message("assistant", said, trained))
    return Chat(tuple(messages))


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def encode_one(example: Example, tokenizer):
    encoded = encode([example], tokenizer)
    assert encoded.offsets.tolist() == [0, len(encoded.tokens)]
    return encoded


def test_one_turn_is_exactly_xtuners(tokenizer):
    """<s> once, loss on the answer and <|im_end|> only, a masked newline, no </s>."""
    encoded = encode_one(chat(("Hi", "Yo")), tokenizer)
    # fmt: off
    assert encoded.tokens.tolist() == [
        1,                                                          # <s>
        264, 120, 118, 104, 117, 13, 75, 108,                       # <|im_start|>user\nHi
        263, 13,                                                    # <|im_end|>\n
        264, 100, 118, 118, 108, 118, 119, 100, 113, 119, 13,       # <|im_start|>assistant\n
        92, 114, 263,                                               # Yo<|im_end|>
        13,                                                         # \n
    ]
    # fmt: on
    assert np.flatnonzero(encoded.trained).tolist() == [22, 23, 24]
    assert encoded.tokens.dtype == np.int32
    assert encoded.trained.dtype == np.bool_


def test_system_text_and_several_turns(tokenizer):
    encoded = encode_one(chat(("Q1", "A1", "S"), ("Q2", "A2", "", False), ("Q3", "A3")), tokenizer)
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


def test_pieces_are_tokenized_one_by_one():
    """Joined, they may get other ids: a tokenizer must not see across the joins."""
    assert render(chat(("Q1", " A1 ", "S"), ("Q2", "A2", "", False))) == [
        (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        (" A1 <|im_end|>", True),
        ("\n", False),
        ("<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n", False),
        ("A2<|im_end|>", False),
        ("\n", False),
    ]


def test_braces_in_the_data_are_only_text():
    (prompt, _), (answer, _), _ = render(chat(("{0} {x}", "{}", "{")))
    assert "system\n{<" in prompt and "user\n{0} {x}<" in prompt
    assert answer == "{}<|im_end|>"


def test_raw_text_is_bos_and_the_stripped_text(tokenizer):
    encoded = encode_one(Text("\n words here \n"), tokenizer)
    assert encoded.tokens.tolist() == [BOS, *ids("words here")]
    assert encoded.trained.tolist() == [False] + [True] * 10


def test_many_examples_are_those_one_by_one(tokenizer):
    talk = chat(("Q", "A"), ("", "B", "S"))
    ids = Ids((7, 8, 9), (True, False, True))
    examples = [Text("a"), ids, talk, Ids((), ()), Text("b c"), talk]
    encoded = encode(examples, tokenizer)
    for example, (begin, end) in zip(examples, pairwise(encoded.offsets), strict=True):
        alone = encode_one(example, tokenizer)
        assert np.array_equal(encoded.tokens[begin:end], alone.tokens)
        assert np.array_equal(encoded.trained[begin:end], alone.trained)
    assert encode([], tokenizer).offsets.tolist() == [0]


GOLDEN = json.loads((Path(__file__).parent / "golden_template.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["tokenizer_tiny", "tokenizer_tiny_spm/tokenizer.model"])
@pytest.mark.parametrize("case", GOLDEN, ids=[next(iter(case["row"])) for case in GOLDEN])
def test_golden_ids_of_every_format(case, kind):
    """Ids and labels of XTuner's algorithm, run on the Hugging Face tokenizer of tests/data."""
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "data" / kind)
    encoded = encode_one(recognize(case["row"]).example, tokenizer)
    assert encoded.tokens.tolist() == case["ids"]
    assert np.where(encoded.trained, encoded.tokens, -100).tolist() == case["labels"]


def test_two_answers_in_a_row_have_no_message_between_them():
    segments = render(chat(("Q", "A"), ("", "B")))
    assert "".join(text for text, _ in segments) == (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>assistant\nB<|im_end|>\n"
    )


class Base:
    """The byte tokenizer without some of its special tokens, as a base model has it."""

    def __init__(self, tokenizer, *lacking: str):
        vars(self).update(dataclasses.asdict(tokenizer), decode=tokenizer.decode, name="base")
        self._tokenizer, self._lacking = tokenizer, lacking

    def encode(self, text):
        for name in self._lacking:
            text = text.replace(name, name.replace("|", "!"))
        return self._tokenizer.encode(text)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


PLUGIN = ("<|plugin|>", "<|action_start|>", "<|action_end|>")


def test_a_chat_needs_the_tokens_of_its_template(tokenizer):
    """The message names what is lacking, and what to take; raw text is fine without."""
    base = Base(tokenizer, "<|im_start|>", "<|im_end|>", *PLUGIN)
    reason = (
        r"tokenizer base lacks <\|im_start\|>, <\|im_end\|>: take a chat model's tokenizer with"
    )
    with pytest.raises(MissingTokens, match=reason):
        encode([Text("a"), chat(("Q", "A"))], base)
    assert encode([Text("a")], base).tokens.tolist() == [BOS, *ids("a")]


def test_only_chats_with_tools_need_the_tokens_of_tools(tokenizer):
    base = Base(tokenizer, *PLUGIN)
    assert encode([chat(("Q", "A"))], base).tokens.size == 24
    tools = Chat((Message("system name=<|plugin|>", "[]"), *chat(("Q", "A")).messages))
    with pytest.raises(MissingTokens, match=r"lacks <\|plugin\|>: take"):
        encode([tools], base)
