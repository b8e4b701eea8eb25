"""Training examples: the meaning of a row, whatever its format."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Raw text: one document, which may be split if it is longer than a packed row."""

    text: str
    splittable = True


class Message(NamedTuple):
    """One message of a chat.

    Attributes:
        role: header of the message: "user", "assistant", "system name=<|plugin|>".
        text: content of the message.
        trained: for an answer, true if it is trained on; None for every other message.
    """

    role: str
    text: str
    trained: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with an answer: never split."""

    messages: tuple[Message, ...]
    splittable = False


@dataclasses.dataclass(frozen=True, slots=True)
class Ids:
    """A document of token ids.

    Attributes:
        tokens: ids; nothing is added to them.
        trained: for each id, true if predicting it counts.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def splittable(self) -> bool:
        """Return true for raw text (no token is masked), false for a chat."""
        return all(self.trained)


Example = Text | Chat | Ids
