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

The names of special tokens in the template and in the data become those tokens, as in XTuner; a
tokenizer without them spells them out.

References:
    InternLM/xtuner v0.1.23: xtuner/utils/templates.py `internlm2_chat`, xtuner/dataset/utils.py
    `encode_fn`, xtuner/dataset/map_fns/template_map_fn.py.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from models.tokenizer import Tokenizer
from train.data.formats import Chat, Ids, Text, Turn

MESSAGE = "<|im_start|>{}\n{}<|im_end|>\n"
OPEN_ANSWER = "<|im_start|>assistant\n"
ANSWER = "{}<|im_end|>"
SEPARATOR = "\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised document of N tokens, the first of them `<s>`.

    Attributes:
        tokens: int32 ids.
        trained: bool, true where predicting this very token counts. The shift to "loss at the
            position before" is made when rows are filled.
    """

    tokens: Int32[np.ndarray, " N"]
    trained: Bool[np.ndarray, " N"]


def encode(samples: Sequence[Text | Chat | Ids], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenises samples, all their pieces in one batch for the tokenizers that are parallel."""
    rendered = [[] if isinstance(sample, Ids) else render(sample) for sample in samples]
    ids = iter(tokenizer.encode_batch([text for pieces in rendered for text, _ in pieces]))
    return [
        Encoded(np.array(sample.tokens, np.int32), np.array(sample.trained, np.bool_))
        if isinstance(sample, Ids)
        else _join(
            list(itertools.islice(ids, len(pieces))), [flag for _, flag in pieces], tokenizer
        )
        for sample, pieces in zip(samples, rendered, strict=True)
    ]


def render(sample: Text | Chat) -> list[tuple[str, bool]]:
    """Returns the pieces of a sample, each to be tokenised by itself, and whether trained on."""
    if isinstance(sample, Text):
        return [(sample.text.strip(), True)]
    pieces = []
    for turn in sample.turns:
        messages = turn.prompt or _messages(turn)
        prompt = "".join(MESSAGE.format(role, text) for role, text in messages)
        pieces += [
            (prompt + OPEN_ANSWER, False),
            (ANSWER.format(turn.output), turn.loss),
            (SEPARATOR, False),
        ]
    return pieces


def _messages(turn: Turn) -> list[tuple[str, str]]:
    system = [("system", turn.system)] if turn.system else []
    return [*system, ("user", turn.input)]


def _join(ids: list[list[int]], trained: list[bool], tokenizer: Tokenizer) -> Encoded:
    ids, trained = [[tokenizer.bos_id], *ids], [False, *trained]
    return Encoded(
        tokens=np.fromiter(itertools.chain.from_iterable(ids), np.int32),
        trained=np.repeat(trained, [len(piece) for piece in ids]),
    )
