"""The conversation format against the original's chat template."""

import dataclasses
import inspect
import json
import shutil
from pathlib import Path

import pytest

from models.chat import check_chat_tokens, encode_chat, missing_chat_tokens
from models.tokenizer import CHAT_TOKENS, ByteTokenizer, load_tokenizer

JSON = Path(__file__).parents[1] / "data" / "tokenizer_tiny"
SPM = JSON.with_name("tokenizer_tiny_spm")
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


@pytest.mark.parametrize("message", [{"role": "user", "content": "hi"}, "hi", ("user",)])
def test_a_message_that_is_no_pair_is_refused(message):
    """A dict would be a message of "role" that says "content"."""
    with pytest.raises(ValueError, match=r"message 2 is a \w+, must be \(role, content\)"):
        inspect.unwrap(encode_chat)([("user", "hi"), message], ByteTokenizer())


def test_a_tokenizer_without_chat_tokens_is_refused():
    mute = dataclasses.replace(ByteTokenizer(), im_start_id=None)
    with pytest.raises(ValueError, match=r"lacks the chat tokens <\|im_start\|>: take"):
        encode_chat([("user", "hi")], mute)


def test_a_tokenizer_that_cannot_chat_is_named_with_what_it_lacks(tmp_path):
    """A base model's: its config names none of the chat tokens."""
    shutil.copytree(SPM, tmp_path / "base")
    config = json.loads((SPM / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {k: v for k, v in added.items() if int(k) < 3}
    del config["additional_special_tokens"]
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "special_tokens_map.json").unlink()
    base = load_tokenizer(tmp_path / "base")
    assert missing_chat_tokens(base) == CHAT_TOKENS
    assert missing_chat_tokens(load_tokenizer(SPM)) == missing_chat_tokens(ByteTokenizer()) == ()
    with pytest.raises(
        ValueError, match="base lacks the chat tokens .*im_end.*: take the tokenizer"
    ):
        check_chat_tokens(base)
    with pytest.raises(ValueError, match="lacks the chat tokens"):
        encode_chat([("user", "hi")], base)
