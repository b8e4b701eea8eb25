"""Chat format of InternLM2."""

from collections.abc import Sequence

from models.byte_tokenizer import CHAT_TOKENS
from models.tokenizer import Tokenizer


def encode_chat(
    messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, generate: bool = True
) -> list[int]:
    r"""Encode a chat: bos, then <|im_start|>role\ncontent<|im_end|>\n for each message.

    Args:
      messages: (role, content); roles are system, user, assistant, environment.
      tokenizer: a tokenizer with chat tokens.
      generate: append the beginning of the assistant's answer.

    Raises:
      ValueError: the tokenizer lacks chat tokens, or a message is no pair.

    References:
      The chat_template in the published tokenizer_config.json.
    """
    check_chat_tokens(tokenizer)
    for number, message in enumerate(messages, start=1):
        # A dict of two keys, as of Hugging Face, would be unpacked to the names of its keys.
        if not isinstance(message, tuple | list) or len(message) != 2:
            raise ValueError(
                f"message {number} is a {type(message).__name__}, must be (role, content)"
            )
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return [
        tokenizer.bos_id,
        *tokenizer.encode(text + "<|im_start|>assistant\n" if generate else text),
    ]


def missing_chat_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the names of InternLM2's six chat tokens that a tokenizer lacks."""
    ids = {"<|im_start|>": tokenizer.im_start_id, "<|im_end|>": tokenizer.im_end_id}
    return tuple(
        name for name in CHAT_TOKENS if len(tokenizer.encode(name)) != 1 or ids.get(name, 0) is None
    )


def check_chat_tokens(tokenizer: Tokenizer) -> None:
    """Check that a tokenizer has the tokens that open and close a chat message.

    Raises:
      ValueError: <|im_start|> or <|im_end|> is missing.
    """
    missing = missing_chat_tokens(tokenizer)
    if "<|im_start|>" in missing or "<|im_end|>" in missing:
        raise ValueError(
            f"tokenizer {tokenizer.name} lacks the chat tokens {', '.join(missing)}: take the "
            "tokenizer of an internlm2-chat model, or its tokenizer.model alone (--tokenizer)"
        )
