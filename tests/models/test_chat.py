"""The conversation format against the original's chat template."""

import dataclasses
import json
from pathlib import Path

import pytest

from models.chat import encode_chat
from models.tokenizer import ByteTokenizer, load_tokenizer

JSON = Path(__file__).parents[1] / "data" / "tokenizer_tiny"
GOLDEN = json.loads((JSON / "golden_tokenizer.json").read_text(encoding="utf-8"))
CHAT = [(message["role"], message["content"]) for message in GOLDEN["chat"]]


def test_ids_are_those_of_the_template():
    tokenizer = load_tokenizer(JSON)
    assert encode_chat(CHAT, tokenizer) == GOLDEN["chat_ids"]
    text = tokenizer.decode(encode_chat(CHAT, tokenizer, generate=False))
    assert text == GOLDEN["chat_text_no_gen"]


def test_the_byte_tokenizer_can_chat():
    byte = ByteTokenizer()
    ids = encode_chat([("user", "hi")], byte)
    assert byte.decode(ids) == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(byte.im_start_id) == 2


def test_a_tokenizer_without_chat_tokens_is_refused():
    mute = dataclasses.replace(ByteTokenizer(), im_start_id=None)
    with pytest.raises(ValueError, match="has no <|im_start|>".replace("|", r"\|")):
        encode_chat([("user", "hi")], mute)
