"""Exceptions as one line of text, and detection of out-of-memory errors."""

import jax


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message; its type's name if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if jax raised the error because device memory, or the host's, ran out."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
