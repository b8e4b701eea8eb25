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

import array
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from models.tokenizer import Tokenizer
from train.data.files.examples import Chat, Ids, Sample, Text


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
    pieces: list[str | tuple[int, ...]] = []  # text, or ids already
    flags: list[bool] = []
    counts: list[int] = []
    given: dict[int, Ids] = {}  # the samples that are ids
    bos = (tokenizer.bos_id,)
    for number, sample in enumerate(samples):
        if isinstance(sample, Ids):
            given[number] = sample
            pieces.append(sample.tokens)
            flags.append(True)
            counts.append(1)
            continue
        rendered = render(sample)
        pieces.append(bos)
        flags.append(False)
        for text, trained in rendered:
            pieces.append(text)
            flags.append(trained)
        counts.append(len(rendered) + 1)
    ids, lengths = _ids(pieces, tokenizer)
    edges = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum(lengths, out=edges[1:])
    offsets = edges[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])]
    trained = np.repeat(np.array(flags, np.bool_), lengths)
    for number, sample in given.items():
        trained[offsets[number] : offsets[number + 1]] = sample.trained
    return Encoded(ids, trained, offsets)


def render(sample: Text | Chat) -> list[tuple[str, bool]]:
    """Returns the pieces of a sample, each to be tokenised by itself, and whether trained on."""
    if isinstance(sample, Text):
        return [(sample.text.strip(), True)]
    pieces = []
    for turn in sample.turns:
        if turn.prompt:
            prompt = "".join([message(role, text) for role, text in turn.prompt])
        else:
            prompt = message("user", turn.input)
            if turn.system:
                prompt = message("system", turn.system) + prompt
        pieces += (
            (f"{prompt}<|im_start|>assistant\n", False),
            (f"{turn.output}<|im_end|>", turn.loss),
            ("\n", False),
        )
    return pieces


def message(role: str, text: str) -> str:
    """Returns one message of a chat that is not an answer."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def _ids(
    pieces: Sequence[str | tuple[int, ...]], tokenizer: Tokenizer
) -> tuple[Int32[np.ndarray, " N"], Int64[np.ndarray, " P"]]:
    """Ids of P pieces one after the other, and how many each has.

    Each text is tokenised once: every turn ends with the same newline, many begin alike.
    """
    distinct = list(dict.fromkeys([piece for piece in pieces if isinstance(piece, str)]))
    ids_of = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    flat: list[int] = []  # a list, because it grows fastest
    lengths: list[int] = []
    for piece in pieces:
        ids = ids_of[piece] if isinstance(piece, str) else piece
        flat += ids
        lengths.append(len(ids))
    # array.array reads a list of int faster than NumPy does.
    return np.frombuffer(array.array("i", flat), np.int32), np.array(lengths, np.int64)
