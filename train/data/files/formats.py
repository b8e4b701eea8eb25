r"""Rows to samples: recognises what a row means by its keys, never by the name of its file.

| format       | keys                    | meaning, as in XTuner's map functions                  |
| ------------ | ----------------------- | ------------------------------------------------------ |
| conversation | conversation            | XTuner's own: turns of system, input, output,          |
|              |                         | output_with_loss                                       |
| messages     | messages                | OpenAI: role and content, per-message `loss`, or       |
|              |                         | `weight` (0 or 1); no tools                            |
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

The first format whose keys are all present, and not null if there is one, is taken, in this order:
the original Alpaca rows also carry a rendered `text`, and rows of a table have all its columns. A
row that fits none, or whose values are of the wrong type or empty, raises `RowError`.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from train.data.files.examples import Chat, Ids, Sample, Text, Turn
from train.data.files.fields import RowError, answer, flag, objects, string, type_name

PLUGIN, ACTION, ACTION_END = "<|plugin|>", "<|action_start|>", "<|action_end|>"
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "observation": f"environment name={PLUGIN}",
    "tool": f"environment name={PLUGIN}",
}
ANSWERS = ("gpt", "assistant", "chatgpt", "function_call")


def recognise(row: object) -> tuple[str, Sample]:
    """Returns the name of a row's format and the sample it means.

    Raises:
        RowError: unknown format, wrong types, empty text or answer, text that is not UTF-8.

    References:
        InternLM/xtuner v0.1.23, xtuner/dataset/map_fns/dataset_map_fns/{alpaca,openai}_map_fn.py
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, this is {type_name(row)}")
    given = tuple([key for key, value in row.items() if value is not None])
    name = _format_of(given) or _format_of(tuple(row))
    if name is None:
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, (keys, _) in FORMATS.items())
        found = ", ".join(map(repr, list(row)[:8])) or "none"
        raise RowError(f"unknown format: keys {found} (known: {known})")
    return name, FORMATS[name][1](row)


@functools.lru_cache(256)  # the rows of a file have the same few sets of keys
def _format_of(found: tuple[str, ...]) -> str | None:
    return next((name for name, (keys, _) in FORMATS.items() if {*keys} <= {*found}), None)


def _conversation(row: dict[str, Any]) -> Chat:
    turns = []
    for number, turn in enumerate(objects(row, "conversation"), start=1):
        where = f"turn {number}: "
        turns.append(
            Turn(
                input=string(turn, "input", where, optional=True),
                output=answer(turn, "output", where),
                system=string(turn, "system", where, optional=True),
                loss=flag(turn, "output_with_loss", where),
            )
        )
    return Chat(tuple(turns))


def _messages(row: dict[str, Any]) -> Chat:
    """Reads OpenAI messages as XTuner does.

    Consecutive user messages are joined; assistant messages before any other, and what follows
    the last answer, have nothing to train and are left out.
    """
    _refuse_tools(row)
    turns: list[Turn] = []
    system = user = ""
    opened = False
    for number, message in enumerate(objects(row, "messages"), start=1):
        where = f"message {number}: "
        role = string(message, "role", where)
        if role == "assistant":
            if opened:
                _refuse_tools(message, where)
                said = answer(message, "content", where)
                turns.append(Turn(user, said, system, _learned(message, where)))
                system = user = ""
            continue
        opened = True
        if role == "system":
            system = string(message, "content", where)
        elif role == "user":
            user += string(message, "content", where)
        else:
            raise RowError(f"{where}unknown role {role!r} (known: system, user, assistant)")
    if not turns:
        raise RowError("no assistant message after a user message")
    return Chat(tuple(turns))


def _refuse_tools(row: dict[str, Any], where: str = "") -> None:
    """Raises RowError for what the template has, but not for OpenAI's way of writing it."""
    for key in ("tools", "functions", "tool_calls", "function_call"):
        if row.get(key):
            raise RowError(f"{where}'{key}' is not read: write the row as ShareGPT conversations")


def _learned(message: dict[str, Any], where: str) -> bool:
    """Whether an answer is trained on: XTuner's `loss`, and `weight` of OpenAI's own files."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise RowError(f"{where}'weight' must be 0 or 1, this is {weight!r:.40}")
    return flag(message, "loss", where) and weight != 0


def _alpaca(row: dict[str, Any]) -> Chat:
    if row.get("history"):
        raise RowError("'history' is not read: write the turns as 'messages'")
    output = answer(row, "output")
    if output == "<nooutput>":  # the Alpaca authors' mark for instructions without an answer
        raise RowError("the output is '<nooutput>'")
    instruction = string(row, "instruction")
    context = string(row, "input", optional=True)
    system = string(row, "system", optional=True)
    return Chat((Turn(f"{instruction}\n{context}", output, system),))


def _sharegpt(row: dict[str, Any]) -> Chat:
    """Reads speakers in any order that has something to answer before each answer.

    Messages before an answer are one prompt, each with its own role; what follows the last answer
    has nothing to train and is left out.
    """
    turns: list[Turn] = []
    prompt: list[tuple[str, str]] = []
    system = string(row, "system", optional=True)
    if system:
        prompt.append(("system", system))
    if row.get("tools") and (tools := _json_text(row, "tools").strip()) != "[]":
        prompt.append((f"system name={PLUGIN}", tools))
    heard = False
    for number, message in enumerate(objects(row, "conversations"), start=1):
        where = f"message {number}: "
        speaker = string(message, "from", where)
        if speaker in SPEAKERS:
            heard = heard or speaker != "system"
            prompt.append((SPEAKERS[speaker], string(message, "value", where)))
        elif speaker in ANSWERS:
            if not heard:
                raise RowError(f"{where}{speaker!r} answers before anyone asked")
            said = answer(message, "value", where)
            if speaker == "function_call":
                said = f"{ACTION}{PLUGIN}\n{said}{ACTION_END}"
            loss = flag(message, "loss", where)
            turns.append(Turn("", said, loss=loss, prompt=tuple(prompt)))
            prompt = []
        else:
            known = ", ".join((*SPEAKERS, *ANSWERS))
            raise RowError(f"{where}unknown speaker {speaker!r} (known: {known})")
    if not turns:
        raise RowError("no answer of 'gpt' or 'function_call'")
    return Chat(tuple(turns))


def _json_text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return string({key: text}, key)


def _tokens(row: dict[str, Any]) -> Ids:
    ids = row["tokens"]
    if not isinstance(ids, list):
        raise RowError(f"'tokens' must be a list, this is {type_name(ids)}")
    for number, token in enumerate(ids, start=1):
        if type(token) is not int or abs(token) >= 2**31:
            raise RowError(f"'tokens' {number} must be an id, this is {token!r:.40}")
    if ids and max(ids[1:], default=-1) < 0:
        raise RowError("'tokens' has none that is trained on")
    return Ids(tuple(map(abs, ids)), tuple(token >= 0 for token in ids))


def _question_answer(row: dict[str, Any]) -> Chat:
    return Chat((Turn(string(row, "question"), answer(row, "answer")),))


def _text(row: dict[str, Any]) -> Text:
    return Text(answer(row, "text"))


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Sample]]] = {
    "conversation": (("conversation",), _conversation),
    "messages": (("messages",), _messages),
    "alpaca": (("instruction", "output"), _alpaca),
    "qa": (("question", "answer"), _question_answer),
    "sharegpt": (("conversations",), _sharegpt),
    "tokens": (("tokens",), _tokens),
    "text": (("text",), _text),
}
