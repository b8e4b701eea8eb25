"""Rows to training examples: what each format means, and why a row cannot be used."""

import itertools
import json

import pytest

from train.data.files.examples import Chat, Ids, Message, Text
from train.data.files.fields import FLAGS, RowError
from train.data.files.formats import recognize

PLUGIN_SYSTEM, PLUGIN_RESULT = "system name=<|plugin|>", "environment name=<|plugin|>"


def chat(*messages: tuple) -> Chat:
    """Make a chat of (role, text); an assistant's is trained on unless a third value is false."""
    return Chat(
        tuple(
            Message(role, text, *(more or ([True] if role.startswith("assistant") else [])))
            for role, text, *more in messages
        )
    )


def example(row: object, **options):
    return recognize(row, **options).example


def pair(question: str = "Q", said: str = "A") -> Chat:
    return chat(("user", question), ("assistant", said))


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"text": " raw "}, "text", Text(" raw ")),
        ({"question": "Q", "answer": "A"}, "qa", pair()),
        (
            {"instruction": "Do", "input": "this", "output": "Done", "text": "rendered"},
            "alpaca",
            pair("Do\nthis", "Done"),
        ),
        # XTuner keeps the newline
        ({"instruction": "Do", "input": "", "output": "Done"}, "alpaca", pair("Do\n", "Done")),
        (
            {"instruction": "Do", "output": "Done", "system": "Be"},
            "alpaca",
            chat(("system", "Be"), ("user", "Do\n"), ("assistant", "Done")),
        ),
        (
            {
                "conversation": [
                    {"system": "S", "input": "Q1", "output": "A1"},
                    {"input": "Q2", "output": "A2", "output_with_loss": False},
                    {"output": "A3"},
                ]
            },
            "conversation",
            chat(
                *(("system", "S"), ("user", "Q1"), ("assistant", "A1")),
                *(("user", "Q2"), ("assistant", "A2", False), ("assistant", "A3")),
            ),
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "before anyone asked"},
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "one "},
                    {"role": "user", "content": "two"},
                    {"role": "assistant", "content": "A1", "loss": "False"},
                    {"role": "user", "content": "three"},
                    {"role": "assistant", "content": "A2", "loss": True},
                    {"role": "user", "content": "four"},
                    {"role": "assistant", "content": "A3", "weight": 0, "tool_calls": None},
                    {"role": "user", "content": "five"},
                    {"role": "assistant", "content": "A4", "weight": 1},
                    {"role": "user", "content": "never answered"},
                ],
                "tools": [],
            },
            "messages",
            chat(
                *(("system", "S"), ("user", "one two"), ("assistant", "A1", False)),
                *(("user", "three"), ("assistant", "A2"), ("user", "four")),
                *(("assistant", "A3", False), ("user", "five"), ("assistant", "A4")),
            ),
        ),
    ],
)
def test_formats_are_recognized_by_their_keys(row, name, expected):
    reading = recognize(row)
    assert (reading.format, reading.example) == (name, expected)


def answered(**more) -> dict:
    answer = {"role": "assistant", "content": "A"} | more
    return {"messages": [{"role": "user", "content": "Q"}, answer]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "a row must be an object, this is a list"),
        (None, "a row must be an object, this is null"),
        ({"prompt": "a", "chosen": "b"}, "unknown format: keys 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a preference row ('chosen' and 'reje"),
        (answered() | {"chosen": {"a": 1}, "rejected": {"a": 2}}, "a preference row"),
        ({}, "unknown format: keys none"),
        ({"text": 7}, "'text' must be a string, this is a number"),
        ({"text": " \n"}, "'text' is empty"),
        ({"question": "Q", "answer": ""}, "'answer' is empty"),
        ({"question": " ", "answer": "A"}, "'question' is empty"),
        ({"question": None, "answer": "A"}, "'question' must be a string, this is null"),
        ({"instruction": "I", "output": "  "}, "'output' is empty"),
        ({"instruction": "I", "output": "<nooutput>"}, "the output is '<nooutput>'"),
        ({"instruction": "I", "output": "A", "history": [["q", "a"]]}, "'history' is not read"),
        ({"instruction": "I", "input": ["x"], "output": "A"}, "'input' must be a string"),
        ({"text": "caf\udce9"}, "'text' is not UTF-8: byte 0xe9 at character 3"),
        ({"text": "\ud83d"}, "'text' is not UTF-8: U+D83D at character 0"),
        ({"conversation": []}, "'conversation' is empty"),
        ({"conversation": {"input": "Q"}}, "'conversation' must be a list, this is an object"),
        ({"conversation": ["Q", "A"]}, "'conversation' 1 must be an object, this is a string"),
        ({"conversation": [{"input": "Q", "output": ""}]}, "turn 1: 'output' is empty"),
        (
            {"conversation": [{"input": "Q", "output": "A", "output_with_loss": "no"}]},
            "turn 1: 'output_with_loss' must be true or false, or 1 or 0, this is 'no'",
        ),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no answer after another message"),
        ({"messages": [{"role": "wizard", "content": "Q"}]}, "message 1: unknown role 'wizard'"),
        ({"messages": [{"content": "Q"}]}, "message 1: 'role' is missing"),
        ({"messages": [{"role": None, "content": "Q"}]}, "message 1: 'role' must be a string"),
        (
            {"messages": [{"from": "human", "value": "Q"}]},
            "message 1: 'role' is missing: messages with 'from' are read from the key "
            "'conversations'",
        ),
        ({"messages": [{"role": "user", "content": 7}]}, "'content' must be a string"),
        (answered(content=None), "message 2: 'content' is empty"),
        (answered(weight=0.5), "message 2: 'weight' must be true or false, or 1 or 0, this is 0.5"),
        (answered(loss_mask=[1, 0]), "message 2: 'loss_mask' must be true or false"),
        (answered(content=[{"type": "image_url"}]), "has a part that is not text: 'image_url'"),
        (answered(tool_calls=[{"id": "1"}]), "message 2: 'tool_calls' must hold calls of funct"),
        (answered(tool_calls={"id": "1"}), "message 2: 'tool_calls' must be a list"),
        (answered() | {"tools": [{"type": "web_search", "function": {}}]}, "tools 1: a tool of ty"),
        ({"messages": [[{"role": "user"}]]}, "'messages' 1 must be an object, this is a list"),
        ({"text": "a", "chosen": json.loads("[" * 990 + "1" + "]" * 990)}, "nested too deeply"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row, reason):
    with pytest.raises(RowError) as error:
        recognize(row)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_sharegpt_with_tools():
    """Every speaker in its place; a call is an answer, the tool's result is not."""
    row = {
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add"}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
            {"from": "human", "value": "thanks"},
        ],
    }
    reading = recognize(row)
    assert reading.format == "sharegpt"
    assert reading.example == chat(
        (PLUGIN_SYSTEM, '[{"name": "add"}]'),
        ("user", "1 + 1?"),
        ("assistant", '<|action_start|><|plugin|>\n{"name": "add"}<|action_end|>'),
        (PLUGIN_RESULT, "2"),
        ("assistant", "Two."),
    )
    assert reading.remarks == ["message(s) after the last answer left out: nothing to train"]


def test_sharegpt_system_and_tools_as_objects():
    said = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]
    row = {"system": "S", "tools": [{"name": "ü"}], "conversations": said}
    prompt = (("system", "S"), (PLUGIN_SYSTEM, '[{"name": "ü"}]'), ("user", "Q"))
    assert example(row) == chat(*prompt, ("assistant", "A"))


def test_a_null_column_decides_nothing():
    """A table of rows of several formats has the columns of all of them, padded by Arrow."""
    null = {"conversation": None, "messages": None, "question": None, "answer": None, "text": None}
    assert recognize(null | {"text": "raw"})[:2] == ("text", Text("raw"))
    assert recognize(null | {"question": "Q", "answer": "A"}).format == "qa"
    padded = {"messages": [{"role": None, "content": None}], "conversation": []}
    assert recognize(padded | {"text": "raw"}).format == "text"
    with pytest.raises(RowError, match="'conversation' must be a list, this is null"):
        recognize(null)


def test_negative_ids_are_tokens_without_loss():
    name, ids, *_ = recognize({"tokens": [1, -333, 0, 7]})
    assert (name, ids) == ("tokens", Ids((1, 333, 0, 7), (True, False, True, True)))
    assert not ids.splittable  # a chat
    assert example({"tokens": [1, 2]}).splittable


def said(*speakers: str) -> dict:
    return {"conversations": [{"from": speaker, "value": "x"} for speaker in speakers]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said("gpt"), "no answer after another message: nothing to train"),
        (said("human"), "no answer after another message: nothing to train"),
        (said("human", "bard"), "message 2: unknown speaker 'bard'"),
        ({"conversations": [{"value": "x"}]}, "message 1: 'from' is missing"),
        (
            {"conversations": [{"role": "user", "content": "Q"}]},
            "message 1: 'from' is missing: messages with 'role' are read from the key 'messages'",
        ),
        (said("human", "gpt") | {"tools": [{"name": "\ud83d"}]}, "'tools' is not UTF-8: U+D83D"),
        ({"tokens": 7}, "'tokens' must be a list, this is a number"),
        ({"tokens": [1, True]}, "'tokens' 2 must be an id, this is True"),
        ({"tokens": [1, 2**31]}, "'tokens' 2 must be an id"),
        ({"tokens": [1, -2]}, "'tokens' has none that is trained on"),
    ],
)
def test_broken_sharegpt_and_tokens(row, reason):
    with pytest.raises(RowError) as error:
        recognize(row)
    assert reason in str(error.value)


# A flag of an answer, in every format that has answers.
WITH_FLAG = {
    "messages": lambda flag: answered(**flag),
    "sharegpt": lambda flag: {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"} | flag]
    },
    "conversation": lambda flag: {"conversation": [{"input": "Q", "output": "A"} | flag]},
    "qa": lambda flag: {"question": "Q", "answer": "A"} | flag,
    "alpaca": lambda flag: {"instruction": "Q", "output": "A"} | flag,
}
BY_ROW = {name: lambda flag, make=make: make({}) | flag for name, make in WITH_FLAG.items()}


@pytest.mark.parametrize("format_", WITH_FLAG)
@pytest.mark.parametrize("make", [WITH_FLAG, BY_ROW], ids=["of the answer", "of the row"])
def test_a_flag_is_honoured_in_every_spelling_and_format(make, format_):
    false = (False, 0, 0.0, "0", "false", "False", " FALSE ")
    true = (True, 1, 1.0, "1", "true", "True", None, "", " ", "null", "None")
    for key, value in itertools.product(FLAGS, false + true):
        reading = recognize(make[format_]({key: value}))
        wanted = value not in false
        assert reading.example.messages[-1].trained is wanted, (key, value)
        assert reading.remarks == ["answer(s) without loss, as the data ask"] * (not wanted)
        assert not reading.unread


def test_one_false_flag_of_several_is_enough():
    assert example(answered(weight=1, train=False)).messages[-1].trained is False
    with pytest.raises(RowError, match="'weight' must be"):
        recognize(answered(train=False, weight=0.3))


def test_a_number_of_a_whole_row_that_is_no_flag_is_a_key_not_read():
    """A score or a sampling weight: it says nothing about one answer."""
    reading = recognize({"question": "Q", "answer": "A", "loss": 2.31, "weight": 0.5})
    assert reading.unread == {"loss", "weight"} and reading.example == pair()


def test_a_flag_that_asks_to_train_another_message_is_said():
    row = answered()
    row["messages"][0]["weight"] = 1
    reading = recognize(row)
    assert reading.example == pair()
    assert reading.remarks == ["message(s) flagged for training that are no answers: without loss"]
    row["messages"][0]["weight"] = 0
    assert not recognize(row).remarks


ABSENT = [
    *(None, "", " ", "\n\t", "null", "None", "NONE", "[]", "[ ]", "{}", '[{"name": null}]', [], {}),
    *([None], [{}], {"a": None}, [{"a": {"b": [None, ""]}}], float("nan"), "[[], {}]"),
]


@pytest.mark.parametrize("format_", WITH_FLAG)
def test_absent_values_are_not_there(format_):
    """One rule for every optional key of every format: no message, no error, no unread key."""
    plain = recognize(WITH_FLAG[format_]({}))
    for key in ("system", "tools", "functions", "context", "chosen", "notes"):
        for value in ABSENT:
            assert recognize(WITH_FLAG[format_]({}) | {key: value}) == plain, (key, value)


def test_absent_calls_names_and_systems_of_messages_are_not_there():
    for value in ABSENT:
        check_absent(value)


def check_absent(value) -> None:
    for key in ("tool_calls", "function_call", "name", "reasoning_content", "id"):
        assert recognize(answered(**{key: value})) == recognize(answered()), key
    if value is None or isinstance(value, str):
        system = {"role": "system", "content": value}
        row = answered()
        row["messages"].insert(0, system)
        assert example(row) == pair()
        spoken = [{"from": "system", "value": value}, {"from": "human", "value": "x"}]
        assert example({"conversations": [*spoken, {"from": "gpt", "value": "x"}]}) == pair(
            "x", "x"
        )


@pytest.mark.parametrize("word", ["None", "null", "[]", "{}"])
def test_words_for_nothing_are_text_where_text_is_required(word):
    """Somebody may answer "None", and a tool may return "[]"."""
    assert example({"question": word, "answer": word}) == pair(word, word)
    row = {"conversations": [{"from": "human", "value": word}, {"from": "gpt", "value": word}]}
    assert example(row) == pair(word, word)
    messages = [{"role": "tool", "content": word}, {"role": "assistant", "content": word}]
    assert example({"messages": messages}) == chat((PLUGIN_RESULT, word), ("assistant", word))


def test_nothing_is_invented_between_two_answers():
    answers = [{"from": "gpt", "value": "A"}, {"from": "function_call", "value": "{}"}]
    row = {
        "conversations": [
            {"from": "human", "value": "Q"},
            *answers,
            {"from": "human", "value": " "},
            *answers,
        ]
    }
    call = ("assistant", "<|action_start|><|plugin|>\n{}<|action_end|>")
    expected = chat(("user", "Q"), ("assistant", "A"), call, ("assistant", "A"), call)
    assert example(row) == expected
    turns = [{"input": "Q", "output": "A"}, {"input": " ", "output": "B"}, {"output": "C"}]
    assert example({"conversation": turns}) == chat(
        ("user", "Q"), ("assistant", "A"), ("assistant", "B"), ("assistant", "C")
    )


def test_answers_before_any_message_are_said():
    """As XTuner does for messages; in both formats alike."""
    row = said("gpt", "human", "gpt")
    assert example(row) == pair("x", "x")
    assert recognize(row).remarks == ["answer(s) before any other message left out"]
    messages = {"messages": [{"role": "assistant", "content": "x"}, *answered()["messages"]]}
    assert recognize(messages).remarks == ["answer(s) before any other message left out"]
    # A system message before is enough.
    assert example(said("system", "gpt")) == chat(("system", "x"), ("assistant", "x"))


@pytest.mark.parametrize("format_", WITH_FLAG)
def test_system_and_tools_of_the_row_come_first(format_):
    row = WITH_FLAG[format_]({}) | {"system": "S", "tools": [{"name": "f"}]}
    first, second, *_ = example(row).messages
    assert (first, second) == (Message("system", "S"), Message(PLUGIN_SYSTEM, '[{"name": "f"}]'))
    assert not recognize(row).unread


def test_context_follows_the_question():
    """As Alpaca's own `input` follows the instruction."""
    assert example({"question": "Q", "context": "C", "answer": "A"}) == pair("Q\nC")
    assert example({"instruction": "Q", "context": "C", "output": "A"}) == pair("Q\nC")
    assert example({"instruction": "Q", "input": "I", "context": "C", "output": "A"}) == pair(
        "Q\nI\nC"
    )


def test_keys_that_are_not_read_are_named_once_a_row():
    row = answered(refusal="no", id="m2") | {"source": "web", "id": 7, "score": 0, "empty": [None]}
    row["messages"][0]["id"] = "m1"
    row["messages"][0]["tool_calls"] = [{"id": "x"}]
    assert recognize(row).unread == {
        *("source", "id", "score", "messages[].refusal", "messages[].id", "messages[].tool_calls")
    }
    assert recognize({"text": "a", "system": "S"}).unread == {"system"}
    assert recognize({"tokens": [1, 2], "labels": [1, 2]}).unread == {"labels"}
    turn = {"input": "Q", "output": "A", "need_eos_token": False}
    assert recognize({"conversation": [turn]}).unread == {"conversation[].need_eos_token"}
    row = {
        "conversations": [{"from": "human", "value": "Q", "x": 1}, {"from": "gpt", "value": "A"}]
    }
    assert recognize(row).unread == {"conversations[].x"}


def test_two_system_messages_are_kept_with_their_names():
    """Also one in the middle, and OpenAI's newer name for them."""
    messages = [
        {"role": "system", "content": "One."},
        {"role": "system", "content": "[]x", "name": "<|plugin|>"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "developer", "content": "Two."},
        {"role": "user", "content": "Q2", "name": "Ann"},
        {"role": "assistant", "content": "A2", "name": "Bob"},
        {"role": "environment", "content": "E", "name": "<|interpreter|>"},
        {"role": "assistant", "content": "A3"},
    ]
    assert example({"messages": messages}) == chat(
        *(("system", "One."), (PLUGIN_SYSTEM, "[]x"), ("user", "Q"), ("assistant", "A")),
        *(("system", "Two."), ("user name=Ann", "Q2"), ("assistant name=Bob", "A2")),
        *(("environment name=<|interpreter|>", "E"), ("assistant", "A3")),
    )


def test_names_are_the_same_in_sharegpt_rows():
    """Results of tools have the plugin's name, whatever theirs is."""
    spoken = [("system", "S"), ("human", "Q"), ("gpt", "A"), ("tool", "R"), ("gpt", "B")]
    row = {"conversations": [{"from": f, "value": v, "name": f"n{v}"} for f, v in spoken]}
    assert example(row) == chat(
        *(("system name=nS", "S"), ("user name=nQ", "Q"), ("assistant name=nA", "A")),
        *((PLUGIN_RESULT, "R"), ("assistant name=nB", "B")),
    )
    assert not recognize(row).unread


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"conversation": [{"input": "", "output": "Raw."}]}, "Raw."),
        ({"conversation": [{"output": "Raw. "}, {"input": None, "output": "More."}]}, "Raw. More."),
        ({"instruction": "", "input": "", "output": "Raw."}, "Raw."),
    ],
)
def test_rows_without_any_prompt_are_raw_text(row, text):
    """XTuner's pre-training rows; said in the report, and their format has a name of its own."""
    reading = recognize(row)
    assert (reading.format, reading.example) == ("pretrain", Text(text))
    assert reading.remarks == ["row(s) without any prompt read as raw text, as XTuner pre-trains"]


def test_a_prompt_of_any_kind_makes_a_chat():
    row = {"conversation": [{"system": "S", "input": "", "output": "A"}]}
    assert recognize(row)[:2] == ("conversation", chat(("system", "S"), ("assistant", "A")))
    untrained = {"conversation": [{"output": "A"}, {"output": "B", "output_with_loss": False}]}
    with pytest.raises(RowError, match="raw text .* with a flag that excludes it from loss"):
        recognize(untrained)


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}


def call(city: str, key: str | None = None, **more) -> dict:
    function = {"name": "weather", "arguments": json.dumps({"city": city}, ensure_ascii=False)}
    return {"id": key, "type": "function", "function": function | more}


def action(city: str) -> str:
    said = f'{{"name": "weather", "parameters": {{"city": "{city}"}}}}'
    return f"<|action_start|><|plugin|>\n{said}<|action_end|>"


def test_tool_calls_are_plugin_messages():
    """Parallel calls in one answer, with text; results in the order of the calls."""
    row = {
        "tools": [{"type": "function", "function": WEATHER}],
        "messages": [
            {"role": "user", "content": "Rain?"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [call("Köln", "a"), call("Ulm", "b")],
            },
            {"role": "tool", "tool_call_id": "b", "content": "dry", "name": "weather"},
            {"role": "tool", "tool_call_id": "a", "content": "wet"},
            {"role": "assistant", "content": None, "tool_calls": [call("Bonn", "c")], "weight": 0},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "fog"}]},
            {"role": "assistant", "content": "Here and there."},
        ],
    }
    reading = recognize(row)
    assert reading.example == chat(
        (PLUGIN_SYSTEM, json.dumps([WEATHER])),
        ("user", "Rain?"),
        ("assistant", "Let me see." + action("Köln") + action("Ulm")),
        (PLUGIN_RESULT, "wet"),
        (PLUGIN_RESULT, "dry"),
        ("assistant", action("Bonn"), False),
        (PLUGIN_RESULT, "fog"),
        ("assistant", "Here and there."),
    )
    assert not reading.unread
    as_text = row | {"tools": json.dumps(row["tools"])}
    assert recognize(as_text) == reading


def test_older_and_padded_calls():
    """OpenAI's functions; arguments as an object; structs that Arrow padded with nulls."""
    padding = {"unit": None, "more": {"deep": None}}
    given = call("Ulm", arguments={"city": "Ulm"} | padding) | {"extra": None}
    for calls in (
        {"tool_calls": [given, None, {"id": None, "function": {"name": None}}]},
        {"function_call": given["function"]},
    ):
        row = {
            "functions": [WEATHER | padding],
            "messages": [
                {"role": "user", "content": "Rain?"},
                {"role": "assistant", "content": "", **calls},
                {"role": "function", "name": "weather", "content": "dry"},
                {"role": "assistant", "content": "No."},
            ],
        }
        assert example(row) == chat(
            (PLUGIN_SYSTEM, json.dumps([WEATHER])),
            ("user", "Rain?"),
            ("assistant", action("Ulm")),
            (PLUGIN_RESULT, "dry"),
            ("assistant", "No."),
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"tool_calls": [call("Ulm", arguments="{no")]},
            "message 2: 'arguments' of 'weather' are no",
        ),
        (
            {"tool_calls": [call("Ulm", arguments="[1]")]},
            "message 2: 'arguments' of 'weather' are no",
        ),
        ({"tool_calls": [call("Ulm", name="")]}, "message 2: 'tool_calls' 'name' is empty"),
        ({"tool_calls": [call("Ulm", "a")]}, "message 3: 'tool_call_id' 'z' is no id of the calls"),
    ],
)
def test_calls_that_cannot_be_read_say_why(change, reason):
    row = answered(content=None, **change)
    row["messages"].append({"role": "tool", "tool_call_id": "z", "content": "dry"})
    with pytest.raises(RowError) as error:
        recognize(row)
    assert reason in str(error.value)


def test_arguments_are_written_as_they_are():
    """A number keeps its digits, and an explicit null stays."""
    arguments = ' {"x": 1.10, "y": null,"z": 1e400} '
    row = answered(content=None, tool_calls=[call("Ulm", arguments=arguments)])
    assert f'"parameters": {arguments.strip()}}}<|action_end|>' in example(row).messages[1].text


KEPT = "answer(s) with reasoning kept (--data.reasoning=drop drops it)"
DROPPED = "answer(s) with reasoning dropped (--data.reasoning=drop)"
WITH_REASONING = {
    "reasoning_content": lambda make: make({"reasoning_content": "Hm.\n"}),
    "reasoning": lambda make: make({"reasoning": "Hm.", "reasoning_content": "Hm."}),
    "thinking": lambda make: make({"thinking": "Hm."}),
}


@pytest.mark.parametrize("key", WITH_REASONING)
@pytest.mark.parametrize("format_", WITH_FLAG)
def test_reasoning_is_kept_or_dropped_and_said(format_, key):
    row = WITH_REASONING[key](WITH_FLAG[format_])
    kept, dropped = recognize(row), recognize(row, "drop")
    assert kept.example.messages[-1].text == "<think>\nHm.\n</think>\n\nA"
    assert dropped.example.messages[-1].text == "A"
    assert (kept.remarks, dropped.remarks) == ([KEPT], [DROPPED])
    assert not (kept.unread or dropped.unread)


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("<think>\nHm.\n</think>\n\nA", "A"),
        ("<think></think>A", "A"),
        ("Hm.\n</think>\n\nA", "A"),  # the opening tag was in the prompt's template
        ("<think>a</think>A <think>b</think>B", "A B"),
    ],
)
def test_reasoning_inside_the_answer(text, dropped):
    row = {"question": "Q", "answer": text}
    assert example(row) == pair(said=text)
    assert recognize(row).remarks == [KEPT]
    assert example(row, reasoning="drop") == pair(said=dropped)


def test_reasoning_that_is_written_twice_is_kept_once():
    """Only inside <think>: a word of the answer is not its reasoning."""
    assert example(answered(reasoning="A")).messages[-1].text == "<think>\nA\n</think>\n\nA"
    row = answered(content="<think>\nHm.\n</think>\n\nA", reasoning_content="Hm.")
    assert example(row).messages[-1].text == "<think>\nHm.\n</think>\n\nA"


@pytest.mark.parametrize("text", ["<think>never ends", "<think>all</think> "])
def test_an_answer_of_reasoning_alone_cannot_be_dropped(text):
    with pytest.raises(RowError, match="without"):
        recognize({"question": "Q", "answer": text}, "drop")


def test_reasoning_before_a_call():
    row = answered(content=None, tool_calls=[call("Ulm")], reasoning_content="Hm.")
    assert example(row).messages[-1].text == "<think>\nHm.\n</think>\n\n" + action("Ulm")
    assert example(row, reasoning="drop").messages[-1].text == action("Ulm")


def test_text_that_is_no_answer_keeps_its_tags():
    row = {
        "messages": [{"role": "user", "content": "<think>a</think>"}, *answered()["messages"][1:]]
    }
    assert example(row, reasoning="drop") == pair("<think>a</think>")
    assert example({"text": "<think>a</think>b"}, reasoning="drop") == Text("<think>a</think>b")
