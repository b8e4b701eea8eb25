"""Cache directories follow the XDG rules, and the two caches do not share a directory."""

import os
from pathlib import Path

import jax
import pytest

from jaxattn.device import host_memory
from train.cache_dirs import compilation_cache, token_cache
from train.distributed import device


@pytest.mark.parametrize("unset", [None, "", "relative/path"])
def test_an_empty_or_relative_variable_counts_as_unset(monkeypatch, unset):
    """The XDG specification demands both."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if unset is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
    monkeypatch.setenv("HOME", "/home/me")
    assert token_cache() == Path("/home/me/.cache/internlm2-jax/tokens")
    assert compilation_cache() == Path("/home/me/.cache/internlm2-jax/xla")


def test_the_variable_moves_both_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert token_cache() == tmp_path / "internlm2-jax" / "tokens"
    assert compilation_cache() == tmp_path / "internlm2-jax" / "xla"


def test_compiled_programs_go_to_the_same_place(monkeypatch):
    """With an empty variable XLA's cache was once made in the working directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delitem(os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delitem(os.environ, "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        device.set_up(keep_compiled=True)
        assert jax.config.jax_compilation_cache_dir == str(compilation_cache())
        pinned = int(os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"])
        assert pinned << 30 > device.HOST_SHARE * host_memory()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
        os.environ.pop("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", None)
