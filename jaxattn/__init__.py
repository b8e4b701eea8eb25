"""Attention for long packed sequences: one interface, several implementations, exact masks."""

import importlib.metadata

from jaxattn.api import (
    ALIASES,
    IMPLEMENTATIONS,
    Dispatch,
    Impl,
    Implementation,
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
    "Impl",
    "Implementation",
    "Mask",
    "attention",
    "describe",
    "prepare",
    "resolve",
]


def __getattr__(name: str) -> str:
    """Return `__version__` of the installed distribution; looked up only when it is asked for."""
    if name == "__version__":
        return importlib.metadata.version("internlm2-jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
