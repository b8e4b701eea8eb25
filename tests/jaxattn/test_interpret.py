"""Interpreted kernel tests fail on a jax whose private code the patches were not made for."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.jaxattn import interpret

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_an_unknown_jax_fails(monkeypatch):
    """Skipping would leave the kernels untested."""
    monkeypatch.setattr(interpret, "VERSION", "0.13")
    with pytest.raises(pytest.fail.Exception, match="adapt interpreter_patches.py"):
        with interpret.interpreted():
            pass


def test_the_bounds_of_jax_are_the_versions_of_the_patches():
    """In every requirement of jax: from the first minor version to below the one after the last."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    bounds = [text for text in requirements if re.match(r"jax\b(?!t)", text)]
    first, last = (int(version.split(".")[1]) for version in interpret.CHECKED_WITH)
    assert len(bounds) == 4
    for text in bounds:
        low, high = re.fullmatch(r"jax(?:\[.*\])?>=0\.(\d+)\.\d+,<0\.(\d+)", text).groups()
        assert (int(low), int(high)) == (first, last + 1), text
