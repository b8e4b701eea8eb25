r"""Training examples to tokens: InternLM2's chat template as XTuner applies it, and plain text.

A chat of two turns (`^` marks the tokens that are trained on, that is, predicted)::

    <s><|im_start|>system\nS<|im_end|>\n           only if the data have a system message
       <|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n
                                                             ^^^^^^^^^^^^
       <|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n
                                                             ^^^^^^^^^^^^
- Prompt, answer + `<|im_end|>`, and the closing newline are tokenized one by one: the ids at
  their joins differ from those of the whole string tokenized at once.
- `<s>` occurs once, at the beginning; `</s>` never; the last newline stays, untrained.
- No message is made up: a row without a system or user message has none.

Raw text is `<s>` + the text without white space at its ends; every token but `<s>` is trained on.
There is no `</s>` at the end: XTuner's pretrain_map_fn has none, the end of a file or of a long
line is rarely the end of an author's text, and a chat model ends with `<|im_end|>` anyway.

The names of special tokens in the data become those tokens, as in XTuner. A tokenizer that lacks
the tokens of the template itself is refused.

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
from train.data.files.examples import Chat, Example, Ids, Text

START, END = "<|im_start|>", "<|im_end|>"
_PLUGIN = ("<|action_start|>", "<|action_end|>", "<|plugin|>")


class MissingTokens(ValueError):
    """A tokenizer lacks tokens of the chat template."""


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """D tokenized documents of N tokens together, one after the other."""

    tokens: Int32[np.ndarray, " N"]  # a document begins with `<s>`, unless it was ids before
    # true if predicting this very token counts; `fill` shifts it to the position before
    trained: Bool[np.ndarray, " N"]
    offsets: Int64[np.ndarray, " E"]  # E = D + 1; document d is `tokens[offsets[d]:offsets[d + 1]]`


def encode(examples: Sequence[Example], tokenizer: Tokenizer) -> Encoded:
    """Tokenize examples, all their segments in one batch for tokenizers that are parallel.

    As much as possible is done in arrays for all examples at once: chats are short.

    Raises:
        MissingTokens: there is a chat, and the tokenizer lacks tokens of the chat template.
    """
    lacking = [name for name in (START, END, *_PLUGIN) if len(tokenizer.encode(name)) != 1]
    segments: list[str | tuple[int, ...]] = []  # text, or ids already
    flags: list[bool] = []
    counts: list[int] = []
    given: dict[int, Ids] = {}  # the examples that are ids
    bos = (tokenizer.bos_id,)
    for number, example in enumerate(examples):
        if isinstance(example, Ids):
            given[number] = example
            segments.append(example.tokens)
            flags.append(True)
            counts.append(1)
            continue
        rendered = render(example)
        if lacking and isinstance(example, Chat):
            _check_tokens(rendered, lacking, tokenizer)
        segments.append(bos)
        flags.append(False)
        for text, trained in rendered:
            segments.append(text)
            flags.append(trained)
        counts.append(len(rendered) + 1)
    ids, lengths = _ids(segments, tokenizer)
    edges = np.zeros(len(segments) + 1, np.int64)
    np.cumsum(lengths, out=edges[1:])
    offsets = edges[np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])]
    trained = np.repeat(np.array(flags, np.bool_), lengths)
    for number, example in given.items():
        trained[offsets[number] : offsets[number + 1]] = example.trained
    return Encoded(ids, trained, offsets)


def render(example: Text | Chat) -> list[tuple[str, bool]]:
    """Return the segments of an example, each to be tokenized alone, with its loss flag."""
    if isinstance(example, Text):
        return [(example.text.strip(), True)]
    segments = []
    prompt = ""
    for role, text, trained in example.messages:
        if trained is None:
            prompt += f"<|im_start|>{role}\n{text}<|im_end|>\n"
            continue
        segments += (
            (f"{prompt}<|im_start|>{role}\n", False),
            (f"{text}<|im_end|>", trained),
            ("\n", False),
        )
        prompt = ""
    return segments


def _check_tokens(
    segments: list[tuple[str, bool]], lacking: list[str], tokenizer: Tokenizer
) -> None:
    found = [name for name in lacking if any(name in text for text, _ in segments)]
    if found:
        raise MissingTokens(
            f"the rows are chats, and tokenizer {tokenizer.name} lacks {', '.join(found)}: take a"
            " chat model's tokenizer with --tokenizer, e.g. that of internlm2-chat"
        )


def _ids(
    segments: Sequence[str | tuple[int, ...]], tokenizer: Tokenizer
) -> tuple[Int32[np.ndarray, " N"], Int64[np.ndarray, " P"]]:
    """Return the ids of P segments one after the other, and the length of each.

    Each text is tokenized once: every turn ends with the same newline, many begin alike.
    """
    distinct = list(dict.fromkeys([text for text in segments if isinstance(text, str)]))
    ids_of = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    flat: list[int] = []  # a list, because it grows fastest
    lengths: list[int] = []
    for segment in segments:
        ids = ids_of[segment] if isinstance(segment, str) else segment
        flat += ids
        lengths.append(len(ids))
    # array.array reads a list of int faster than NumPy does.
    return np.frombuffer(array.array("i", flat), np.int32), np.array(lengths, np.int64)
