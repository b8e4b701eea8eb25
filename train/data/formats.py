r"""Rows to samples: recognises what a row means by its keys, never by the name of its file.

| format       | keys                    | meaning, as in XTuner's map functions                  |
| ------------ | ----------------------- | ------------------------------------------------------ |
| conversation | conversation            | XTuner's own: turns of system, input, output,          |
|              |                         | output_with_loss                                       |
| messages     | messages                | OpenAI: role and content, per-message `loss`           |
| alpaca       | instruction, output     | input = instruction + "\n" + input, also where the     |
|              |                         | input is empty; `system` where the row has one         |
| qa           | question, answer        | one turn                                               |
| sharegpt     | conversations           | from and value; see below                              |
| tokens       | tokens                  | InternEvo: ids; -id is a token that is not trained on. |
|              |                         | One with such tokens is a chat, else raw text          |
| text         | text                    | raw text for pre-training                              |

ShareGPT's speakers, and what they are in InternLM2's chat (the published template for tools):

| from                           | message                                                       |
| ------------------------------ | ------------------------------------------------------------- |
| system                         | `system`; a row's own `system` key comes first                |
| the row's `tools`              | `system name=<|plugin|>`, the JSON as it stands               |
| human, user                    | `user`                                                        |
| observation, tool              | `environment name=<|plugin|>`                                 |
| function_call                  | `assistant`: `<|action_start|><|plugin|>` + newline + call +  |
|                                | `<|action_end|>`; trained on, like an answer                  |
| gpt, assistant, chatgpt        | `assistant`                                                   |

The first format whose keys are all present is taken, in this order: the original Alpaca rows
also carry a rendered `text`. A row that fits none, or whose values are of the wrong type or
empty, raises `RowError`.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

PLUGIN, ACTION, ACTION_END = "<|plugin|>", "<|action_start|>", "<|action_end|>"
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "observation": f"environment name={PLUGIN}",
    "tool": f"environment name={PLUGIN}",
}
ANSWERS = ("gpt", "assistant", "chatgpt", "function_call")


class RowError(ValueError):
    """A row that cannot be used; the message says why in a few words."""


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Raw text: one document, which may be split when it is longer than a row."""

    text: str
    splittable = True


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One exchange.

    Attributes:
        input: what the user says; may be empty.
        output: what the assistant answers; not empty.
        system: system text before the user's, empty for none.
        loss: whether the answer is trained on.
        prompt: (role, text) of the messages before the answer, where they are not just a system
            text and a user's; `input` and `system` are empty then.
    """

    input: str
    output: str
    system: str = ""
    loss: bool = True
    prompt: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """A conversation of one or more turns: never split."""

    turns: tuple[Turn, ...]
    splittable = False


@dataclasses.dataclass(frozen=True, slots=True)
class Ids:
    """A document that is tokens already.

    Attributes:
        tokens: ids; nothing is added to them.
        trained: whether predicting each one counts.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def splittable(self) -> bool:
        """A document without masked tokens is raw text; one with them is a chat."""
        return all(self.trained)


def recognise(row: object) -> tuple[str, Text | Chat | Ids]:
    """Returns the name of a row's format and the sample it means.

    Raises:
        RowError: unknown format, wrong types, empty text or answer, text that is not UTF-8.

    References:
        InternLM/xtuner v0.1.23, xtuner/dataset/map_fns/dataset_map_fns/{alpaca,openai}_map_fn.py
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, this is {_type_name(row)}")
    for name, (keys, read) in FORMATS.items():
        if all(key in row for key in keys):
            return name, read(row)
    known = "; ".join(f"{name}: {', '.join(keys)}" for name, (keys, _) in FORMATS.items())
    found = ", ".join(map(repr, list(row)[:8])) or "none"
    raise RowError(f"unknown format: keys {found} (known: {known})")


def _conversation(row: dict[str, Any]) -> Chat:
    turns = []
    for number, turn in enumerate(_objects(row, "conversation"), start=1):
        where = f"turn {number}: "
        turns.append(
            Turn(
                input=_string(turn, "input", where, optional=True),
                output=_answer(turn, "output", where),
                system=_string(turn, "system", where, optional=True),
                loss=_flag(turn, "output_with_loss", where),
            )
        )
    return Chat(tuple(turns))


def _messages(row: dict[str, Any]) -> Chat:
    """Reads OpenAI messages as XTuner does.

    Consecutive user messages are joined; assistant messages before any other, and what follows
    the last answer, have nothing to train and are left out.
    """
    turns: list[Turn] = []
    system = user = ""
    opened = False
    for number, message in enumerate(_objects(row, "messages"), start=1):
        where = f"message {number}: "
        role = _string(message, "role", where)
        if role == "assistant":
            if opened:
                answer = _answer(message, "content", where)
                turns.append(Turn(user, answer, system, _flag(message, "loss", where)))
                system = user = ""
            continue
        opened = True
        if role == "system":
            system = _string(message, "content", where)
        elif role == "user":
            user += _string(message, "content", where)
        else:
            raise RowError(f"{where}unknown role {role!r} (known: system, user, assistant)")
    if not turns:
        raise RowError("no assistant message after a user message")
    return Chat(tuple(turns))


def _alpaca(row: dict[str, Any]) -> Chat:
    if row.get("history"):
        raise RowError("'history' is not read: write the turns as 'messages'")
    answer = _answer(row, "output")
    if answer == "<nooutput>":  # the Alpaca authors' mark for instructions without an answer
        raise RowError("the output is '<nooutput>'")
    instruction = _string(row, "instruction")
    context = _string(row, "input", optional=True)
    system = _string(row, "system", optional=True)
    return Chat((Turn(f"{instruction}\n{context}", answer, system),))


def _sharegpt(row: dict[str, Any]) -> Chat:
    """Reads speakers in any order that has something to answer before each answer.

    Messages before an answer are one prompt, each with its own role; what follows the last answer
    has nothing to train and is left out.
    """
    turns: list[Turn] = []
    prompt: list[tuple[str, str]] = []
    system = _string(row, "system", optional=True)
    if system:
        prompt.append(("system", system))
    if row.get("tools") and (tools := _json_text(row, "tools").strip()) != "[]":
        prompt.append((f"system name={PLUGIN}", tools))
    heard = False
    for number, message in enumerate(_objects(row, "conversations"), start=1):
        where = f"message {number}: "
        speaker = _string(message, "from", where)
        if speaker in SPEAKERS:
            heard = heard or speaker != "system"
            prompt.append((SPEAKERS[speaker], _string(message, "value", where)))
        elif speaker in ANSWERS:
            if not heard:
                raise RowError(f"{where}{speaker!r} answers before anyone asked")
            answer = _answer(message, "value", where)
            if speaker == "function_call":
                answer = f"{ACTION}{PLUGIN}\n{answer}{ACTION_END}"
            loss = _flag(message, "loss", where)
            turns.append(Turn("", answer, loss=loss, prompt=tuple(prompt)))
            prompt = []
        else:
            known = ", ".join((*SPEAKERS, *ANSWERS))
            raise RowError(f"{where}unknown speaker {speaker!r} (known: {known})")
    if not turns:
        raise RowError("no answer of 'gpt' or 'function_call'")
    return Chat(tuple(turns))


def _json_text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    return _string(row, key) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _tokens(row: dict[str, Any]) -> Ids:
    ids = row["tokens"]
    if not isinstance(ids, list):
        raise RowError(f"'tokens' must be a list, this is {_type_name(ids)}")
    for number, token in enumerate(ids, start=1):
        if type(token) is not int or abs(token) >= 2**31:
            raise RowError(f"'tokens' {number} must be an id, this is {token!r:.40}")
    if ids and max(ids[1:], default=-1) < 0:
        raise RowError("'tokens' has none that is trained on")
    return Ids(tuple(map(abs, ids)), tuple(token >= 0 for token in ids))


def _question_answer(row: dict[str, Any]) -> Chat:
    return Chat((Turn(_string(row, "question"), _answer(row, "answer")),))


def _text(row: dict[str, Any]) -> Text:
    return Text(_answer(row, "text"))


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Text | Chat | Ids]]] = {
    "conversation": (("conversation",), _conversation),
    "messages": (("messages",), _messages),
    "alpaca": (("instruction", "output"), _alpaca),
    "qa": (("question", "answer"), _question_answer),
    "sharegpt": (("conversations",), _sharegpt),
    "tokens": (("tokens",), _tokens),
    "text": (("text",), _text),
}


def _objects(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"'{key}' must be a list, this is {_type_name(items)}")
    if not items:
        raise RowError(f"'{key}' is empty")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise RowError(f"'{key}' {number} must be an object, this is {_type_name(item)}")
    return items


def _answer(row: dict[str, Any], key: str, where: str = "") -> str:
    """Returns a string that must hold more than white space: there is nothing else to train."""
    value = _string(row, key, where)
    if not value.strip():
        raise RowError(f"{where}'{key}' is empty")
    return value


def _string(row: dict[str, Any], key: str, where: str = "", *, optional: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{where}'{key}' must be a string, this is {_type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        # source.py reads bytes that are not UTF-8 as U+DC80..U+DCFF (surrogateescape).
        raw = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise RowError(f"{where}'{key}' is not UTF-8: {raw} at character {error.start}") from None
    return value


def _flag(row: dict[str, Any], key: str, where: str) -> bool:
    """Returns a truth value given as a bool or as a string; true where it is missing."""
    value = str(row.get(key, True)).lower()
    if value not in ("true", "false"):
        raise RowError(f"{where}'{key}' must be true or false, this is {row[key]!r:.40}")
    return value == "true"


def _type_name(value: object) -> str:
    names = {type(None): "null", bool: "a bool", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
