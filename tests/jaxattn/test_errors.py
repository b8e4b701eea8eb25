"""One line for an exception, and out-of-memory errors by their status."""

import jax

from jaxattn.errors import first_line, is_out_of_memory


def test_first_line():
    assert first_line(ValueError("one\ntwo\n")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_out_of_memory_is_a_status_of_jax():
    error = jax.errors.JaxRuntimeError
    assert is_out_of_memory(error("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.\nbuffers"))
    assert not is_out_of_memory(error("INTERNAL: a kernel failed"))
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
