r"""Rows to training examples: a row's format is recognized by its keys, never by its file name.

| format       | keys                | meaning                                                     |
| ------------ | ------------------- | ----------------------------------------------------------- |
| conversation | conversation        | XTuner's own: turns of system, input, output                |
| pretrain     | conversation        | the same, every input empty: raw text (also from alpaca)    |
| messages     | messages            | OpenAI: role, content, name, tool_calls, tool_call_id       |
| alpaca       | instruction, output | user = instruction + "\n" + input, also without an input    |
| qa           | question, answer    | one turn                                                    |
| sharegpt     | conversations       | from, value, name; speakers below                           |
| tokens       | tokens              | InternEvo: ids; -id is a token that is not trained on. Rows |
|              |                     | with such tokens are chats, other rows raw text             |
| text         | text                | raw text for pre-training                                   |

In every chat format: `system` and `tools` (or `functions`) of the row come first; `context` follows
the question or instruction; an answer with a false flag (fields.FLAGS), its own or its row's, is
not trained on; reasoning is kept or dropped. Absent values (fields.absent) are not there at all. An
answer before any other message, in messages and sharegpt, and messages after the last answer are
left out and counted. Keys that are not read are counted, too.

| OpenAI role      | ShareGPT speaker        | message in InternLM2's chat format                |
| ---------------- | ----------------------- | ------------------------------------------------- |
| system,developer | system                  | `system`; a message's name follows as ` name=...` |
| the row's tools  | the row's tools         | `system name=<|plugin|>`: JSON list of functions  |
| user             | human, user             | `user`; in messages, consecutive ones are joined  |
| tool, function   | observation, tool       | `environment name=<|plugin|>`                     |
| assistant        | gpt, assistant, chatgpt | `assistant`                                       |
| its tool_calls   | function_call           | in the answer, for each: `<|action_start|>` +     |
|                  |                         | `<|plugin|>` + newline + JSON + `<|action_end|>`  |

The first format whose keys are all present is taken, in the order of the first table: the original
Alpaca rows also have a rendered `text`, and rows of a table have all its columns.

References:
    InternLM/xtuner v0.1.23, xtuner/dataset/map_fns/dataset_map_fns/{alpaca,openai,pretrain}_map_fn;
    InternLM/InternLM chat/chat_format.md for plugins.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from train.data.files.examples import Chat, Example, Ids, Message, Text
from train.data.files.fields import (
    FLAGS,
    RowError,
    absent,
    answer,
    content,
    flag,
    objects,
    optional,
    string,
    trained,
    type_name,
    without_padding,
)

Reasoning = Literal["keep", "drop"]

PLUGIN, ACTION, ACTION_END = "<|plugin|>", "<|action_start|>", "<|action_end|>"
_TOOLS, _RESULT = f"system name={PLUGIN}", f"environment name={PLUGIN}"
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "observation": _RESULT,
    "tool": _RESULT,
}
ANSWERS = ("gpt", "assistant", "chatgpt", "function_call")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "environment": "environment",
    "tool": _RESULT,
    "function": _RESULT,
}

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_THINK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)

# Keys that are read: of the rows of each format, and of their turns, messages and calls.
_OF_ROW = frozenset(("system", "tools", "functions", *FLAGS))
_OF_CONVERSATION = _OF_ROW | {"conversation"}
_OF_MESSAGES = _OF_ROW | {"messages"}
_OF_SHAREGPT = _OF_ROW | {"conversations"}
_OF_QA = _OF_ROW | {"question", "answer", "context", *_THOUGHTS}
_OF_ALPACA = _OF_ROW | {"instruction", "input", "output", "history", "context", *_THOUGHTS}
_OF_TURN = frozenset(("system", "input", "output", *FLAGS, *_THOUGHTS))
_OF_SPEAKER = frozenset(("from", "value", "name", *FLAGS))
_OF_GPT = _OF_SPEAKER | {*_THOUGHTS}
_OF_MESSAGE = frozenset(("role", "content", "name", *FLAGS))
_OF_RESULT = _OF_MESSAGE | {"tool_call_id"}
_OF_ASSISTANT = _OF_MESSAGE | {"tool_calls", "function_call", *_THOUGHTS}
_OF_CALL = frozenset(("id", "type", "index", "function"))
_NO_OPTIONS = _OF_ROW.isdisjoint
_NO_FLAGS = frozenset(FLAGS).isdisjoint
_NO_THOUGHTS = frozenset(_THOUGHTS).isdisjoint


class Reading(NamedTuple):
    """A row that was read."""

    format: str  # name of its format
    example: Example  # the training example
    # keys with content that are not read, with those of turns as "messages[].key"
    unread: set[str]
    remarks: list[str]  # further facts that the data report counts, one entry each time


def recognize(row: object, reasoning: Reasoning = "keep") -> Reading:
    """Return the training example that a row means.

    Raises:
        RowError: unknown format, wrong types, empty text or answer, text that is not UTF-8.
    """
    if not isinstance(row, dict):
        raise RowError(f"a row must be an object, this is {type_name(row)}")
    try:
        return _read(row, reasoning)
    except RecursionError:
        raise RowError("the row is nested too deeply") from None


def _read(row: dict[str, Any], reasoning: Reasoning) -> Reading:
    if "rejected" in row and not (absent(row.get("chosen")) or absent(row["rejected"])):
        raise RowError(
            "a preference row ('chosen' and 'rejected') is not read: write the chosen answer as"
            " 'messages' to train on it"
        )
    given = tuple([k for k, v in row.items() if isinstance(v, str) or not absent(v)])
    name = _format_of(given) or _format_of(tuple(row))
    if name is None:
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, (keys, _) in FORMATS.items())
        found = ", ".join(map(repr, list(row)[:8])) or "none"
        raise RowError(f"unknown format: keys {found} (known: {known})")
    reader = _Reader(row, reasoning)
    example = FORMATS[name][1](reader)
    if isinstance(example, Chat):
        for _, _, loss in example.messages:
            if loss is False:
                reader.remarks.append("answer(s) without loss, as the data ask")
    elif isinstance(example, Text) and name != "text":
        name = "pretrain"
        reader.remarks.append("row(s) without any prompt read as raw text, as XTuner pre-trains")
    return Reading(name, example, reader.unread, reader.remarks)


@functools.lru_cache(256)  # the rows of a file have the same few sets of keys
def _format_of(found: tuple[str, ...]) -> str | None:
    return next((name for name, (keys, _) in FORMATS.items() if {*keys} <= {*found}), None)


@functools.lru_cache(256)
def _is_plain(found: tuple[str, ...], known: frozenset[str]) -> bool:
    """Return true if all keys of a row are known, and none is an option of every format."""
    return known.issuperset(found) and _NO_OPTIONS(found)


class _Reader:
    """Reader of one row: one method a format, then the parts that all formats share."""

    def __init__(self, row: dict[str, Any], reasoning: Reasoning):
        self.row, self.reasoning = row, reasoning
        self.unread: set[str] = set()
        self.remarks: list[str] = []
        self.messages: list[Message] = []
        self.trained = True  # unless a flag of the row excludes its answers

    def conversation(self) -> Example:
        self._begin(_OF_CONVERSATION)
        for where, turn in objects(self.row, "conversation", "turn"):
            self._skip(turn, _OF_TURN, "conversation[].")
            self._say("system", optional(turn, "system", where))
            self._say("user", optional(turn, "input", where))
            self._answer("assistant", turn, answer(turn, "output", where), where)
        return self._pretrain() or self._chat()

    def openai(self) -> Chat:
        self._begin(_OF_MESSAGES)
        calls: dict[str, int] = {}  # ids of the last answer's calls, in order
        results: list[tuple[int, str]] = []  # of these calls, with the place of each

        def flush() -> None:
            # InternLM2's format has no ids: the order of results is that of their calls.
            for _, text in sorted(results, key=lambda result: result[0]):
                self._say(_RESULT, text)
            results.clear()

        for where, message in objects(self.row, "messages", "message"):
            role = _speaker(message, "role", where)
            header = "assistant" if role == "assistant" else ROLES.get(role)
            if header is None:
                known = ", ".join((*ROLES, "assistant"))
                raise RowError(f"{where}unknown role {role!r} (known: {known})")
            if header == _RESULT:
                self._skip(message, _OF_RESULT, "messages[].")
                place = _place(message, calls, len(results), where)
                results.append((place, content(message, "content", where)))
                continue
            flush()
            header = _named(header, message, where)
            if role == "assistant":
                self._skip(message, _OF_ASSISTANT, "messages[].")
                ids, actions = self._calls(message, where)
                text = content(message, "content", where)
                if not text and not actions:
                    raise RowError(f"{where}'content' is empty")
                if self._heard():
                    calls = {key: place for place, key in enumerate(ids) if key}
                    self._answer(header, message, text, where, actions)
            else:
                self._skip(message, _OF_MESSAGE, "messages[].", asks=True)
                said = content(message, "content", where)
                said = "" if role in ("system", "developer") and absent(said) else said
                self._say(header, said, join=header == "user")
        flush()
        return self._chat()

    def alpaca(self) -> Example:
        if not absent(self.row.get("history")):
            raise RowError("'history' is not read: write the turns as 'messages'")
        self._begin(_OF_ALPACA)
        output = answer(self.row, "output")
        if output == "<nooutput>":  # the Alpaca authors' mark for instructions without an answer
            raise RowError("the output is '<nooutput>'")
        said = [string(self.row, "instruction"), optional(self.row, "input")]
        if context := optional(self.row, "context"):
            said = [part for part in (*said, context) if part]
        self._say("user", "\n".join(said) if any(map(str.strip, said)) else "")
        self._answer("assistant", self.row, output, "")
        return self._pretrain() or self._chat()

    def question_answer(self) -> Chat:
        self._begin(_OF_QA)
        text, said = answer(self.row, "answer"), answer(self.row, "question")
        context = optional(self.row, "context")
        self._say("user", f"{said}\n{context}" if context else said)
        self._answer("assistant", self.row, text, "")
        return self._chat()

    def sharegpt(self) -> Chat:
        self._begin(_OF_SHAREGPT)
        for where, message in objects(self.row, "conversations", "message"):
            speaker = _speaker(message, "from", where)
            if speaker in SPEAKERS:
                self._skip(message, _OF_SPEAKER, "conversations[].", asks=True)
                said = content(message, "value", where)
                said = "" if speaker == "system" and absent(said) else said
                self._say(_named(SPEAKERS[speaker], message, where), said)
            elif speaker in ANSWERS:
                self._skip(message, _OF_GPT, "conversations[].")
                text = answer(message, "value", where)
                call = [f"{ACTION}{PLUGIN}\n{text}{ACTION_END}"]
                text, actions = ("", call) if speaker == "function_call" else (text, [])
                if self._heard():
                    header = _named("assistant", message, where)
                    self._answer(header, message, text, where, actions)
            else:
                known = ", ".join((*SPEAKERS, *ANSWERS))
                raise RowError(f"{where}unknown speaker {speaker!r} (known: {known})")
        return self._chat()

    def tokens(self) -> Ids:
        self._skip(self.row, frozenset(("tokens",)))
        ids = self.row["tokens"]
        if not isinstance(ids, list):
            raise RowError(f"'tokens' must be a list, this is {type_name(ids)}")
        for number, token in enumerate(ids, start=1):
            if type(token) is not int or abs(token) >= 2**31:
                raise RowError(f"'tokens' {number} must be an id, this is {token!r:.40}")
        if ids and max(ids[1:], default=-1) < 0:
            raise RowError("'tokens' has none that is trained on")
        return Ids(tuple(map(abs, ids)), tuple(token >= 0 for token in ids))

    def raw_text(self) -> Text:
        self._skip(self.row, frozenset(("text",)))
        return Text(answer(self.row, "text"))

    def _begin(self, known: frozenset[str]) -> None:
        """Begin a chat with the row's system text and tools, and count the keys not in `known`."""
        if _is_plain(tuple(self.row), known):
            return
        self._skip(self.row, known)
        self._say("system", optional(self.row, "system"))
        for key in ("tools", "functions"):
            if self.row.get(key):
                self._say(_TOOLS, self._functions(key))
        if _NO_FLAGS(self.row):
            return
        flags = {key: flag(self.row, key) for key in FLAGS if not absent(self.row.get(key))}
        # A number that is no flag may be anything: a score, the weight of a whole row.
        self.unread |= {key for key, value in flags.items() if value is None}
        self.trained = False not in flags.values()

    def _skip(
        self, item: dict[str, Any], known: frozenset[str], prefix: str = "", asks: bool = False
    ) -> None:
        """Count the keys of a row or turn with content that are not in `known`.

        With `asks` also true flags: the item is no answer, and only answers are trained on.
        """
        if not known.issuperset(item):
            self.unread |= {
                prefix + key for key in item if key not in known and not absent(item[key])
            }
        if asks and not _NO_FLAGS(item) and any(flag(item, key) for key in FLAGS if key in item):
            self.remarks.append("message(s) flagged for training that are no answers: without loss")

    def _say(self, role: str, text: str, *, join: bool = False) -> None:
        """Add a message that is no answer; none if the text is empty."""
        if not text:
            return
        if join and self.messages and self.messages[-1].role == role:
            text = self.messages.pop().text + text
        self.messages.append(Message(role, text))

    def _heard(self) -> bool:
        """Return true if anything precedes an answer; count an answer without."""
        if not self.messages:
            self.remarks.append("answer(s) before any other message left out")
        return bool(self.messages)

    def _answer(
        self, role: str, turn: dict[str, Any], text: str, where: str, calls: list[str] | None = None
    ) -> None:
        if not _NO_THOUGHTS(turn) or "think>" in text:
            text = self._with_reasoning(turn, text, where, alone=not calls)
        if calls:
            text += "".join(calls)
        loss = (turn is self.row or _NO_FLAGS(turn) or trained(turn, where)) and self.trained
        self.messages.append(Message(role, text, loss))

    def _with_reasoning(self, turn: dict[str, Any], text: str, where: str, *, alone: bool) -> str:
        """Return an answer with its reasoning in <think> ... </think>, or without any."""
        given = (optional(turn, key, where).strip() for key in _THOUGHTS)
        thoughts = dict.fromkeys(filter(None, given))  # some servers write one text in two keys
        if not thoughts and "think>" not in text:
            return text
        if self.reasoning == "keep":
            self.remarks.append("answer(s) with reasoning kept (--data.reasoning=drop drops it)")
            inside = [match.strip() for match in _THINK.findall(text)]
            more = [said for said in thoughts if said not in inside]
            return "".join(f"<think>\n{said}\n</think>\n\n" for said in more) + text
        self.remarks.append("answer(s) with reasoning dropped (--data.reasoning=drop)")
        text = _THINK.sub("", text)
        # Some rows begin inside the reasoning: their prompt's template holds the opening tag.
        text = text.rpartition("</think>")[2].lstrip() if "</think>" in text else text
        if "<think>" in text:
            raise RowError(f"{where}a <think> without an end")
        if alone and not text.strip():
            raise RowError(f"{where}the answer is empty without its reasoning")
        return text

    def _pretrain(self) -> Text | None:
        """Return the raw text of a row that has answers and nothing else."""
        for message in self.messages:
            if message.trained is None:
                return None
        if not self.messages:
            return None
        if not all(message.trained for message in self.messages):
            raise RowError("raw text (no turn has a prompt) with a flag that excludes it from loss")
        return Text("".join(message.text for message in self.messages))

    def _chat(self) -> Chat:
        messages = self.messages
        while messages and messages[-1].trained is None:
            messages.pop()
            self.remarks.append("message(s) after the last answer left out: nothing to train")
        if not messages:
            raise RowError("no answer after another message: nothing to train")
        return Chat(tuple(messages))

    def _functions(self, key: str) -> str:
        """Return the row's tools as InternLM2's list of functions; "" if there are none."""
        value = self.row[key]
        if absent(value):
            return ""
        items = _parsed(value)
        if isinstance(items, list) and any(isinstance(i, dict) and "function" in i for i in items):
            items = [item for item in items if not absent(item)]
            value = [self._function(item, f"{key} {n}: ") for n, item in enumerate(items, 1)]
        elif not isinstance(value, str):
            value = without_padding(value)
        text = value.strip() if isinstance(value, str) else _json(value)
        return string({key: text}, key)

    def _function(self, tool: Any, where: str) -> Any:
        kind = tool.get("type") if isinstance(tool, dict) else type_name(tool)
        if not isinstance(tool, dict) or kind not in (None, "function"):
            raise RowError(f"{where}a tool of type {kind!r:.40} is not read, only functions")
        self._skip(tool, _OF_CALL, "tools[].")
        return without_padding(tool.get("function"))

    def _calls(self, message: dict[str, Any], where: str) -> tuple[list[str], list[str]]:
        """Return the ids and the text of an OpenAI answer's calls, in order."""
        given = _parsed(message.get("tool_calls"))
        given = [] if absent(given) else given
        if not absent(old := message.get("function_call")):
            given = [*given, {"function": old}]
        if not isinstance(given, list):
            raise RowError(f"{where}'tool_calls' must be a list, this is {type_name(given)}")
        ids, texts = [], []
        for call in (call for call in given if not absent(call)):
            function = call.get("function") if isinstance(call, dict) else None
            if not isinstance(function, dict):
                raise RowError(f"{where}'tool_calls' must hold calls of functions")
            self._skip(call, _OF_CALL, "messages[].tool_calls[].")
            name = answer(function, "name", f"{where}'tool_calls' ")
            ids.append(optional(call, "id", where))
            texts.append(f"{ACTION}{PLUGIN}\n{_call_json(name, function, where)}{ACTION_END}")
        return ids, texts


def _speaker(message: dict[str, Any], key: str, where: str) -> str:
    """Return the role, or ShareGPT's speaker, of a message."""
    if key not in message:
        other, name = {"role": ("from", "conversations"), "from": ("role", "messages")}[key]
        if other in message:
            raise RowError(
                f"{where}'{key}' is missing: messages with '{other}' are read from the key '{name}'"
            )
    return string(message, key, where)


def _named(header: str, message: dict[str, Any], where: str) -> str:
    """Return the header of a message with its name, if it has one; results have the plugin's."""
    name = "" if header == _RESULT else optional(message, "name", where)
    return f"{header} name={name}" if name else header


def _place(message: dict[str, Any], calls: dict[str, int], default: int, where: str) -> int:
    """Return the place among the last answer's calls of the one that a result belongs to."""
    key = optional(message, "tool_call_id", where)
    if key and calls and key not in calls:
        raise RowError(f"{where}'tool_call_id' {key!r:.60} is no id of the calls before it")
    return calls.get(key, default)


def _call_json(name: str, function: dict[str, Any], where: str) -> str:
    """Return {"name": ..., "parameters": ...}, with arguments given as JSON text as they are."""
    arguments = function.get("arguments")
    if absent(arguments):
        text = "{}"
    elif isinstance(arguments, str):
        text = arguments.strip()
        if not isinstance(_parsed(text), dict):
            raise RowError(f"{where}'arguments' of {name!r:.40} are no JSON object")
    else:
        text = _json(without_padding(arguments))
    return string({"call": f'{{"name": {_json(name)}, "parameters": {text}}}'}, "call", where)


def _parsed(value: Any) -> Any:
    """Return the value of JSON text; anything else, and text that is no JSON, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[_Reader], Example]]] = {
    "conversation": (("conversation",), _Reader.conversation),
    "messages": (("messages",), _Reader.openai),
    "alpaca": (("instruction", "output"), _Reader.alpaca),
    "qa": (("question", "answer"), _Reader.question_answer),
    "sharegpt": (("conversations",), _Reader.sharegpt),
    "tokens": (("tokens",), _Reader.tokens),
    "text": (("text",), _Reader.raw_text),
}
