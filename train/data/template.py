r"""Samples to tokens: InternLM2's chat template exactly as XTuner makes it, and plain text.

A chat of two turns (`^` marks the tokens that are trained on, that is predicted)::

    <s><|im_start|>system\nS<|im_end|>\n           only where the turn has system text
       <|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n
                                                             ^^^^^^^^^^^^
       <|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n
                                                             ^^^^^^^^^^^^
- Prompt, answer + `<|im_end|>`, and the closing newline are tokenised one by one: the ids at
  their joins differ from those of the whole string tokenised at once.
- `<s>` stands once, at the very beginning; `</s>` never; the last newline stays, untrained.
- No system text is made up: a row without one has none.

Raw text is `<s>` + the text without white space at its ends, all of it trained but `<s>`. There
is no `</s>` at the end: XTuner's pretrain_map_fn has none, the end of a file or of a long line
is seldom the end of what an author had to say, and a chat model ends with `<|im_end|>` anyway.

A tokenizer without the two chat tokens (the byte tokenizer) spells them out as text.

References:
    InternLM/xtuner v0.1.23: xtuner/utils/templates.py `internlm2_chat`, xtuner/dataset/utils.py
    `encode_fn`, xtuner/dataset/map_fns/template_map_fn.py.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from train.data.formats import Chat, RowError, Text

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"


@runtime_checkable  # beartype checks it in the tests
class Tokenizer(Protocol):
    """What the data needs of a tokenizer (models.tokenizer makes them)."""

    @property
    def bos_id(self) -> int: ...  # noqa: D102
    @property
    def pad_id(self) -> int: ...  # noqa: D102
    @property
    def im_start_id(self) -> int | None: ...  # noqa: D102
    @property
    def im_end_id(self) -> int | None: ...  # noqa: D102

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, with no `<s>` before and no `</s>` after."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised document of N tokens.

    Attributes:
        tokens: int32 ids.
        trained: bool, true where predicting this very token counts. The shift to "loss at the
            position before" is made when rows are filled.
    """

    tokens: Int32[np.ndarray, " N"]
    trained: Bool[np.ndarray, " N"]


def encode(sample: Text | Chat, tokenizer: Tokenizer) -> Encoded:
    """Tokenises one sample.

    Raises:
        RowError: the text has no tokens.
    """
    pieces = _chat(sample, tokenizer) if isinstance(sample, Chat) else _text(sample, tokenizer)
    tokens = [token for ids, _ in pieces for token in ids]
    trained = np.repeat([flag for _, flag in pieces], [len(ids) for ids, _ in pieces])
    return Encoded(np.asarray(tokens, np.int32), trained)


def _text(sample: Text, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    ids = tokenizer.encode(sample.text.strip())
    if not ids:
        raise RowError("the text has no tokens")
    return [([tokenizer.bos_id], False), (ids, True)]


def _chat(sample: Chat, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    start = _special(tokenizer.im_start_id, IM_START, tokenizer)
    end = _special(tokenizer.im_end_id, IM_END, tokenizer)
    newline = tokenizer.encode("\n")
    assistant = tokenizer.encode("assistant\n")
    pieces = [([tokenizer.bos_id], False)]
    for turn in sample.turns:
        prompt = []
        if turn.system:
            prompt += start + tokenizer.encode(f"system\n{turn.system}") + end + newline
        prompt += start + tokenizer.encode(f"user\n{turn.input}") + end + newline
        prompt += start + assistant
        answer = tokenizer.encode(turn.output) + end
        pieces += [(prompt, False), (answer, turn.loss), (newline, False)]
    return pieces


def _special(token_id: int | None, text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text) if token_id is None else [token_id]
