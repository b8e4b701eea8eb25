"""Attention for long packed sequences: one interface, several implementations, exact masks."""

from jaxattn.api import (
    ALIASES,
    IMPLEMENTATIONS,
    Dispatch,
    attention,
    describe,
    prepare,
    resolve,
)
from jaxattn.mask import Mask

__all__ = [
    "ALIASES",
    "IMPLEMENTATIONS",
    "Dispatch",
    "Mask",
    "attention",
    "describe",
    "prepare",
    "resolve",
]
