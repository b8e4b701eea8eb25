"""The package's metadata: version, type markers, console commands."""

import importlib
import importlib.metadata
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import jaxattn
import models

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("package", [jaxattn, models])
def test_version_is_that_of_the_installed_distribution(package):
    """`__version__` is not written down a second time."""
    assert package.__version__ == importlib.metadata.version("internlm2-jax")


@pytest.mark.parametrize("package", [jaxattn, models])
def test_other_missing_names_are_attribute_errors(package):
    """The lookup of `__version__` does not answer for other names."""
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'no"):
        _ = package.no_such_name


@pytest.mark.parametrize("package", ["jaxattn", "models", "train"])
def test_packages_have_a_type_marker(package):
    """Type checkers read the annotations of the installed packages (PEP 561)."""
    assert (ROOT / package / "py.typed").is_file()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in data["package-data"][package]


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_console_commands_are_functions_that_return_a_status(command):
    """Every command's target exists, takes no required argument and returns the exit status."""
    module, _, name = PROJECT["scripts"][command].partition(":")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    assert all(p.default is not p.empty for p in signature.parameters.values())
    assert signature.return_annotation is int


def test_changelog_and_citation_have_the_version():
    """CHANGELOG.md's first released section and CITATION.cff agree with pyproject.toml."""
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()
    sections = [x for x in (ROOT / "CHANGELOG.md").read_text().splitlines() if x[:3] == "## "]
    released = [x for x in sections if "Unreleased" not in x]
    assert released[0].split()[1] == PROJECT["version"]


def test_readme_is_short_and_its_links_exist():
    """README.md has at most 130 lines, and every relative link names a file of the repository."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert len(links) > 10
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]
