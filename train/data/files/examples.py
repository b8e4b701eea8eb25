"""Training examples: the meaning of a row, whatever its format."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Raw text: one document, which may be split if it is longer than a packed row."""

    text: str
    splittable = True


class Message(NamedTuple):
    """One message of a chat."""

    role: str  # header of the message: "user", "assistant", "system name=<|plugin|>"
    text: str  # content of the message
    # for an answer, true if it is trained on; None for every other message
    trained: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an answer: never split."""

    messages: tuple[Message, ...]
    splittable = False


@dataclasses.dataclass(frozen=True, slots=True)
class Ids:
    """A document of token ids."""

    tokens: tuple[int, ...]  # ids; nothing is added to them
    trained: tuple[bool, ...]  # for each id, true if predicting it counts

    @property
    def splittable(self) -> bool:
        """Return true for raw text (no token is masked), false for a chat."""
        return all(self.trained)


Example = Text | Chat | Ids
