"""Attention for long packed sequences: one interface, several implementations, exact masks."""

from jaxattn.api import (
    ALIASES,
    IMPLEMENTATIONS,
    Dispatch,
    attention,
    describe,
    device_memory,
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
    "device_memory",
    "prepare",
    "resolve",
]
