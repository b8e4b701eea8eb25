"""Fixtures for the tests of jaxattn."""

import pytest

from jaxattn import device
from tests.jaxattn.interpret import hopper


@pytest.fixture
def on_hopper(monkeypatch):
    """Make an H200 the default device of jaxattn; no kernel can run, but shapes are checked."""
    monkeypatch.setattr(device, "default_device", hopper)
