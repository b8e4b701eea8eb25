"""Random rows of every format, each with the messages and flags that it must become.

An account of the formats that shares no code with train/data: a row is made from its messages.
"""

import json
import random
from typing import Any

SPELLINGS = ("weight", "train", "trainable", "training", "loss", "loss_mask", "output_with_loss")
NOTHING = (None, "", " ", "null", "None", "[]", [], {}, {"a": None}, [{"a": None}])
WORDS = ("red", "blue", "Ä", "你好", "🐉", "x = 1", "{0}", "a\nb", '"q"', "\\", "<b>", "1.5", "end")
PLUGIN = "<|plugin|>"

Expected = list[tuple[str, bool]] | None
"""Segments of text, each with its loss flag; None: the row is refused."""


class Maker:
    """Makes rows with one source of chance."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)

    def row(self) -> tuple[dict[str, Any], Expected]:
        """Return a row, and the segments that it must become."""
        make = self.chance.choice(
            (self.openai, self.sharegpt, self.conversation, self.qa, self.alpaca, self.raw)
        )
        row, expected = make()
        for key in ("id", "source", "meta"):
            if self.chance.random() < 0.2:
                row[key] = self.chance.choice((7, "web", {"a": 1}))
        items = list(row.items())
        self.chance.shuffle(items)
        return dict(items), expected

    def text(self) -> str:
        return " ".join(self.chance.choices(WORDS, k=self.chance.randint(1, 6)))

    def flag(self, item: dict[str, Any]) -> bool:
        """Give an answer a flag, or none, and return whether it is trained on."""
        if self.chance.random() < 0.5:
            return True
        trained = self.chance.random() < 0.5
        values = (True, 1, "1", "true", "True", None) if trained else (False, 0, "0", "false", 0.0)
        item[self.chance.choice(SPELLINGS)] = self.chance.choice(values)
        return trained

    def reasoning(self, item: dict[str, Any], key: str, said: str) -> str:
        """Give an answer reasoning, or none, and return its text with it."""
        item[key] = said
        if self.chance.random() < 0.8:
            return said
        thought = self.text()
        full = f"<think>\n{thought}\n</think>\n\n{said}"
        if self.chance.random() < 0.5:
            item[key] = full
        else:
            item[self.chance.choice(("reasoning_content", "reasoning"))] = thought
        return full

    def head(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        """Give a row system text and tools, or nothing in one of its spellings."""
        messages = []
        if self.chance.random() < 0.3:
            row["system"] = self.text()
            messages.append(("system", row["system"]))
        elif self.chance.random() < 0.5:
            row["system"] = self.chance.choice((None, "", " ", "null", "None"))
        if self.chance.random() < 0.3:
            functions = [{"name": f"f{i}", "description": self.text()} for i in range(2)]
            said = json.dumps(functions, ensure_ascii=False)
            wrapped = [{"type": "function", "function": function} for function in functions]
            row["tools"] = self.chance.choice((functions, said, wrapped, json.dumps(wrapped)))
            messages.append((f"system name={PLUGIN}", said))
        elif self.chance.random() < 0.5:
            row["tools"] = self.chance.choice(NOTHING)
        return messages

    def openai(self) -> tuple[dict[str, Any], Expected]:
        row: dict[str, Any] = {}
        said: list[tuple] = list(self.head(row))
        items: list[dict[str, Any]] = []
        for _ in range(self.chance.randint(1, 4)):
            if self.chance.random() < 0.2:
                text = self.chance.choice((self.text(), "", None))
                items.append({"role": "system", "content": text})
                said += [("system", text)] if text else []
            items.append({"role": "user", "content": self.text()})
            said.append(("user", items[-1]["content"]))
            if self.chance.random() < 0.3:
                self.call(items, said)
            answer: dict[str, Any] = {"role": "assistant"}
            text = self.reasoning(answer, "content", self.text())
            items.append(answer)
            said.append(("assistant", text, self.flag(answer)))
        if self.chance.random() < 0.2:
            items.append({"role": "user", "content": self.text()})
        row["messages"] = items
        return row, segments(said)

    def call(self, items: list[dict[str, Any]], said: list[tuple]) -> None:
        """Add an answer with calls, and their results, in any order if they have ids."""
        count, text = self.chance.randint(1, 3), self.chance.choice(("", self.text()))
        arguments = [json.dumps({"x": self.text()}, ensure_ascii=False) for _ in range(count)]
        calls = [
            {
                "id": f"c{i}",
                "type": "function",
                "function": {"name": f"f{i}", "arguments": argument},
            }
            for i, argument in enumerate(arguments)
        ]
        answer = {"role": "assistant", "content": text or None, "tool_calls": calls}
        items.append(answer)
        actions = "".join(
            f'<|action_start|>{PLUGIN}\n{{"name": "f{i}", "parameters": {argument}}}<|action_end|>'
            for i, argument in enumerate(arguments)
        )
        said.append(("assistant", text + actions, self.flag(answer)))
        results = [
            {"role": "tool", "tool_call_id": f"c{i}", "content": self.text()} for i in range(count)
        ]
        said += [(f"environment name={PLUGIN}", result["content"]) for result in results]
        self.chance.shuffle(results)
        items += results

    def sharegpt(self) -> tuple[dict[str, Any], Expected]:
        row: dict[str, Any] = {}
        said: list[tuple] = list(self.head(row))
        items = []
        for _ in range(self.chance.randint(1, 4)):
            for _ in range(self.chance.randint(1, 2)):
                speaker, role = self.chance.choice(
                    (("human", "user"), ("user", "user"), ("system", "system"))
                )
                items.append({"from": speaker, "value": self.text()})
                said.append((role, items[-1]["value"]))
            for _ in range(self.chance.randint(0, 2)):
                item: dict[str, Any] = {"from": "function_call", "value": json.dumps({"name": "f"})}
                items.append(item)
                action = f"<|action_start|>{PLUGIN}\n{item['value']}<|action_end|>"
                said.append(("assistant", action, self.flag(item)))
                items.append(
                    {"from": "observation", "value": self.chance.choice((self.text(), ""))}
                )
                if items[-1]["value"]:
                    said.append((f"environment name={PLUGIN}", items[-1]["value"]))
            item = {"from": self.chance.choice(("gpt", "assistant", "chatgpt"))}
            items.append(item)
            said.append(("assistant", self.reasoning(item, "value", self.text()), self.flag(item)))
        row["conversations"] = items
        return row, segments(said)

    def conversation(self) -> tuple[dict[str, Any], Expected]:
        row: dict[str, Any] = {}
        said: list[tuple] = list(self.head(row))
        turns = []
        for _ in range(self.chance.randint(1, 3)):
            turn: dict[str, Any] = {"input": self.chance.choice((self.text(), "", None, " "))}
            if self.chance.random() < 0.3:
                turn["system"] = self.chance.choice((self.text(), "", None))
            said += [("system", turn["system"])] if turn.get("system") else []
            said += [("user", turn["input"])] if turn["input"] and turn["input"].strip() else []
            said.append(("assistant", self.reasoning(turn, "output", self.text()), self.flag(turn)))
            turns.append(turn)
        row["conversation"] = turns
        if any(len(message) == 2 for message in said):
            return row, segments(said)
        if all(trained for _, _, trained in said):
            return row, [("".join(text for _, text, _ in said), True)]
        return row, None

    def qa(self) -> tuple[dict[str, Any], Expected]:
        row: dict[str, Any] = {"question": self.text()}
        return self.pair(row, row["question"], "answer")

    def alpaca(self) -> tuple[dict[str, Any], Expected]:
        row: dict[str, Any] = {"instruction": self.text()}
        row["input"] = self.chance.choice((self.text(), "", None, "None"))
        context = row["input"] if row["input"] not in (None, "None") else ""
        return self.pair(row, f"{row['instruction']}\n{context}", "output")

    def pair(self, row: dict[str, Any], user: str, key: str) -> tuple[dict[str, Any], Expected]:
        said: list[tuple] = list(self.head(row))
        if self.chance.random() < 0.2:
            row["context"] = self.text()
            user = user.removesuffix("\n") + "\n" + row["context"]
        said.append(("user", user))
        said.append(("assistant", self.reasoning(row, key, self.text()), self.flag(row)))
        return row, segments(said)

    def raw(self) -> tuple[dict[str, Any], Expected]:
        text = self.text()
        return {"text": f" {text}\n"}, [(text, True)]


def segments(messages: list[tuple]) -> list[tuple[str, bool]]:
    """Return the text of messages in InternLM2's chat format, and which of it is trained on."""
    found = []
    for role, text, *trained in messages:
        if trained:
            found += [
                (f"<|im_start|>{role}\n", False),
                (f"{text}<|im_end|>", trained[0]),
                ("\n", False),
            ]
        else:
            found.append((f"<|im_start|>{role}\n{text}<|im_end|>\n", False))
    return found


def merged(parts: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Join neighbors with the same flag."""
    found: list[tuple[str, bool]] = []
    for text, flag in parts:
        if found and found[-1][1] == flag:
            found[-1] = (found[-1][0] + text, flag)
        else:
            found.append((text, flag))
    return found
