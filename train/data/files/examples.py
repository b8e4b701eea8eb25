"""Samples: what a row means, whatever its format."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Raw text: one document, which may be split when it is longer than a row."""

    text: str
    splittable = True


class Turn(NamedTuple):
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


Sample = Text | Chat | Ids
