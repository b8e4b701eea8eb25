"""Rows to samples: what each format means, and why a row cannot be used."""

import pytest

from train.data.files.examples import Chat, Ids, Text, Turn
from train.data.files.fields import RowError
from train.data.files.formats import recognise


@pytest.mark.parametrize(
    ("row", "name", "sample"),
    [
        ({"text": " raw "}, "text", Text(" raw ")),
        ({"question": "Q", "answer": "A"}, "qa", Chat((Turn("Q", "A"),))),
        (
            {"instruction": "Do", "input": "this", "output": "Done", "text": "rendered"},
            "alpaca",
            Chat((Turn("Do\nthis", "Done"),)),
        ),
        (
            {"instruction": "Do", "input": "", "output": "Done"},
            "alpaca",
            Chat((Turn("Do\n", "Done"),)),  # XTuner keeps the newline
        ),
        (
            {"instruction": "Do", "output": "Done", "system": "Be"},
            "alpaca",
            Chat((Turn("Do\n", "Done", "Be"),)),
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
            Chat((Turn("Q1", "A1", "S"), Turn("Q2", "A2", loss=False), Turn("", "A3"))),
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
            Chat(
                (
                    Turn("one two", "A1", "S", loss=False),
                    *(Turn("three", "A2"), Turn("four", "A3", loss=False), Turn("five", "A4")),
                )
            ),
        ),
    ],
)
def test_formats_are_recognised_by_their_keys(row, name, sample):
    assert recognise(row) == (name, sample)


def answered(**more) -> dict:
    answer = {"role": "assistant", "content": "A"} | more
    return {"messages": [{"role": "user", "content": "Q"}, answer]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "a row must be an object, this is a list"),
        (None, "a row must be an object, this is null"),
        ({"prompt": "a", "chosen": "b"}, "unknown format: keys 'prompt', 'chosen'"),
        ({}, "unknown format: keys none"),
        ({"text": 7}, "'text' must be a string, this is a number"),
        ({"text": " \n"}, "'text' is empty"),
        ({"question": "Q", "answer": ""}, "'answer' is empty"),
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
            "turn 1: 'output_with_loss' must be true or false, this is 'no'",
        ),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no assistant message"),
        ({"messages": [{"role": "tool", "content": "Q"}]}, "message 1: unknown role 'tool'"),
        ({"messages": [{"content": "Q"}]}, "message 1: 'role' must be a string"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' must be a string"),
        (answered(weight=0.5), "message 2: 'weight' must be 0 or 1, this is 0.5"),
        (answered(weight="0"), "message 2: 'weight' must be 0 or 1, this is '0'"),
        (answered(tool_calls=[{"id": "1"}]), "message 2: 'tool_calls' is not read: write the row"),
        (answered(content=None, function_call={"name": "f"}), "'function_call' is not read"),
        (answered() | {"tools": [{"type": "function"}]}, "'tools' is not read: write the row as"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row, reason):
    with pytest.raises(RowError) as error:
        recognise(row)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_sharegpt_with_tools():
    """Every speaker in its place; a call is an answer, what the tool says is not."""
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
    call = '<|action_start|><|plugin|>\n{"name": "add"}<|action_end|>'
    asked = (("system name=<|plugin|>", '[{"name": "add"}]'), ("user", "1 + 1?"))
    told = (("environment name=<|plugin|>", "2"),)
    turns = (Turn("", call, prompt=asked), Turn("", "Two.", prompt=told))
    assert recognise(row) == ("sharegpt", Chat(turns))


def test_sharegpt_system_and_tools_as_objects():
    said = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]
    row = {"system": "S", "tools": [{"name": "ü"}], "conversations": said}
    prompt = (("system", "S"), ("system name=<|plugin|>", '[{"name": "ü"}]'), ("user", "Q"))
    assert recognise(row) == ("sharegpt", Chat((Turn("", "A", prompt=prompt),)))


@pytest.mark.parametrize("tools", ["[]", "", [], None])
def test_sharegpt_without_tools(tools):
    row = said("human", "gpt") | {"tools": tools}
    assert recognise(row) == ("sharegpt", Chat((Turn("", "x", prompt=(("user", "x"),)),)))


def test_a_null_column_decides_nothing():
    """A table of rows of several formats has the columns of all of them."""
    null = {"conversation": None, "messages": None, "question": None, "answer": None, "text": None}
    assert recognise(null | {"text": "raw"}) == ("text", Text("raw"))
    assert recognise(null | {"question": "Q", "answer": "A"})[0] == "qa"
    with pytest.raises(RowError, match="'conversation' must be a list, this is null"):
        recognise(null)


def test_negative_ids_are_tokens_without_loss():
    name, ids = recognise({"tokens": [1, -333, 0, 7]})
    assert (name, ids) == ("tokens", Ids((1, 333, 0, 7), (True, False, True, True)))
    assert not ids.splittable  # a chat
    assert recognise({"tokens": [1, 2]})[1].splittable


def said(*speakers: str) -> dict:
    return {"conversations": [{"from": speaker, "value": "x"} for speaker in speakers]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (said("gpt"), "message 1: 'gpt' answers before anyone asked"),
        (said("system", "gpt"), "message 2: 'gpt' answers before anyone asked"),
        (said("human"), "no answer of 'gpt' or 'function_call'"),
        (said("human", "bard"), "message 2: unknown speaker 'bard'"),
        ({"conversations": [{"value": "x"}]}, "message 1: 'from' must be a string"),
        (said("human", "gpt") | {"tools": [{"name": "\ud83d"}]}, "'tools' is not UTF-8: U+D83D"),
        ({"tokens": 7}, "'tokens' must be a list, this is a number"),
        ({"tokens": [1, True]}, "'tokens' 2 must be an id, this is True"),
        ({"tokens": [1, 2**31]}, "'tokens' 2 must be an id"),
        ({"tokens": [1, -2]}, "'tokens' has none that is trained on"),
    ],
)
def test_broken_sharegpt_and_tokens(row, reason):
    with pytest.raises(RowError) as error:
        recognise(row)
    assert reason in str(error.value)
