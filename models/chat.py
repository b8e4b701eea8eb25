"""InternLM2's conversation format."""

from collections.abc import Sequence

from models.tokenizer import Tokenizer


def encode_chat(
    messages: Sequence[tuple[str, str]], tokenizer: Tokenizer, *, generate: bool = True
) -> list[int]:
    r"""Ids of a conversation: bos, then <|im_start|>role\ncontent<|im_end|>\n for each message.

    Args:
      messages: (role, content); roles are system, user, assistant, environment.
      tokenizer: with chat tokens.
      generate: end with the opening of the assistant's turn.

    Raises:
      ValueError: the tokenizer has no chat tokens.

    References:
      The chat_template in the published tokenizer_config.json.
    """
    if tokenizer.im_start_id is None or tokenizer.im_end_id is None:
        raise ValueError(f"tokenizer {tokenizer.name} has no <|im_start|> and <|im_end|>")
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return [
        tokenizer.bos_id,
        *tokenizer.encode(text + "<|im_start|>assistant\n" if generate else text),
    ]
