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
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from models.tokenizer import Tokenizer
from train.data.samples import Chat, Ids, Sample, Text, Turn

MESSAGE = "<|im_start|>{}\n{}<|im_end|>\n"
OPEN_ANSWER = "<|im_start|>assistant\n"
ANSWER = "{}<|im_end|>"
SEPARATOR = "\n"


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """D tokenised documents of N tokens together, one after the other.

    Attributes:
        tokens: int32 ids; a document begins with `<s>`, unless it was ids before.
        trained: bool, true where predicting this very token counts. The shift to "loss at the
            position before" is made when rows are filled.
        offsets: int64, E = D + 1; document d is `tokens[offsets[d]:offsets[d + 1]]`.
    """

    tokens: Int32[np.ndarray, " N"]
    trained: Bool[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " E"]


def encode(samples: Sequence[Sample], tokenizer: Tokenizer) -> Encoded:
    """Tokenises samples, all their pieces in one batch for the tokenizers that are parallel.

    What is done for each sample is as little as can be, the rest is done in arrays for all at once:
    chats are short, and building cares for every microsecond of them.
    """
    rendered = [[] if isinstance(sample, Ids) else render(sample) for sample in samples]
    ids_of = _encode_distinct((text for pieces in rendered for text, _ in pieces), tokenizer)
    ids: list[Sequence[int]] = []
    flags: list[bool] = []
    counts: list[int] = []
    for sample, pieces in zip(samples, rendered, strict=True):
        if isinstance(sample, Ids):
            ids.append(sample.tokens)
            flags.append(True)
            counts.append(1)
        else:
            ids.append((tokenizer.bos_id,))
            flags.append(False)
            for text, trained in pieces:
                ids.append(ids_of[text])
                flags.append(trained)
            counts.append(len(pieces) + 1)
    edges = np.zeros(len(ids) + 1, np.int64)
    np.cumsum([len(piece) for piece in ids], out=edges[1:])
    offsets = edges[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])]
    trained = np.repeat(np.array(flags, np.bool_), np.diff(edges))
    for sample, start, end in zip(samples, offsets, offsets[1:], strict=False):
        if isinstance(sample, Ids):
            trained[start:end] = sample.trained
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(edges[-1]))
    return Encoded(tokens, trained, offsets)


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


def _encode_distinct(texts: Iterable[str], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Tokenises each text once: every turn ends with the same newline, many begin alike."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
