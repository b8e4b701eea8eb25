"""Built-in tokenizer of UTF-8 bytes, with the interface `models.tokenizer.Tokenizer`."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

BYTE = "byte"
# The six chat tokens in the order of their ids, the last six of the vocabulary. In the published
# tokenizer.model these ids are named [UNUSED_TOKEN_141] .. [UNUSED_TOKEN_146].
CHAT_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)


_FIRST_BYTE = 3
_FIRST_CHAT = 259
_CHAT = re.compile(f"({'|'.join(map(re.escape, CHAT_TOKENS))})")


@dataclasses.dataclass
class ByteTokenizer:
    """Tokenizer of UTF-8 bytes, with the ids of the first tokens of InternLM2's vocabulary.

    0 <unk>, 1 <s>, 2 </s> (also padding), 3 .. 258 the bytes, 259 .. 264 the chat tokens in their
    published order. Decoding returns every encoded text exactly.
    """

    name: str = BYTE
    fingerprint: str = "byte-1"
    vocab_size: int = 265
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 2
    im_start_id: int | None = 264
    im_end_id: int | None = 263

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`. Of the special tokens the six chat tokens are recognized."""
        ids: list[int] = []
        for piece in _CHAT.split(text):
            if piece in CHAT_TOKENS:
                ids.append(_FIRST_CHAT + CHAT_TOKENS.index(piece))
            else:
                # surrogatepass: JSON may contain half of a surrogate pair.
                utf8 = np.frombuffer(piece.encode("utf-8", "surrogatepass"), np.uint8)
                ids.extend((utf8.astype(np.int32) + _FIRST_BYTE).tolist())
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """See `Tokenizer`. Ids from 265, of a padded vocabulary, become U+FFFD."""
        parts = [_byte_piece(int(i), skip_special) for i in ids]
        return b"".join(parts).decode("utf-8", "replace")


@functools.cache
def _byte_piece(token: int, skip_special: bool) -> bytes:
    if _FIRST_BYTE <= token < _FIRST_CHAT:
        return bytes([token - _FIRST_BYTE])
    specials = ("<unk>", "<s>", "</s>") if token < _FIRST_BYTE else CHAT_TOKENS
    index = token if token < _FIRST_BYTE else token - _FIRST_CHAT
    if not 0 <= index < len(specials):
        return "�".encode()
    return b"" if skip_special else specials[index].encode()
