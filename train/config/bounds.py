"""Bounds of flags: which values a flag may have, declared beside it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """A condition on the value of a flag, for `Annotated[type, Bound(...)]`."""

    holds: Callable[[Any], bool]
    text: str  # as in "--steps=0 must be at least 1"


def at_least(least: int) -> Bound:
    """Return the bound of values from `least` on."""
    return Bound(lambda value: value >= least, f"at least {least}")


def above(limit: int) -> Bound:
    """Return the bound of values larger than `limit`."""
    return Bound(lambda value: value > limit, f"above {limit}")


POSITIVE = Bound(lambda value: 0 < value < math.inf, "above 0 and finite")
NOT_NEGATIVE = Bound(lambda value: 0 <= value < math.inf, "at least 0 and finite")


def check_bounds(config: Any, prefix: str = "--") -> None:
    """Raise ValueError if a field of a dataclass is out of its bound, or empty text.

    None is within all bounds. The prefix precedes the names of its fields, such as "--optim.".
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        check_not_empty(f"{prefix}{field.name}", value)
        for bound in getattr(field.type, "__metadata__", ()):
            if isinstance(bound, Bound) and value is not None:
                require(bound.holds(value), f"{prefix}{field.name}", value, bound.text)


def check_not_empty(flag: str, *values: object) -> None:
    """Raise ValueError if a value is empty text, as of a shell variable that is not set.

    A path that is empty would be the working directory.
    """
    if "" in values:
        raise ValueError(f"{flag}= is empty: give a value, or leave the flag out")


def require(holds: bool, flag: str, value: object, bound: str) -> None:
    """Raise ValueError with the flag, its value and the bound, unless the bound `holds`."""
    if not holds:
        raise ValueError(f"{flag}={value} must be {bound}")
