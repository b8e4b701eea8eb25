"""Version and commit of the code that wrote a checkpoint."""

import importlib
import importlib.metadata
import subprocess

import jax
import pytest

from train import version


@pytest.fixture(autouse=True)
def fresh():
    """Clear the cache, which lasts for a process, before and after each test."""
    version.code_version.cache_clear()
    yield
    version.code_version.cache_clear()


def git(where, *arguments):
    me = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(where), *me, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    (tmp_path / "version.py").write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(version, "__file__", str(tmp_path / "version.py"))
    return tmp_path


def test_libraries_by_version():
    found = version.code_version()
    assert [*found] == ["internlm2-jax", "commit", "jax", "flax", "optax"]
    assert found["jax"] == jax.__version__


def test_the_commit_and_whether_files_differ_from_it(repository):
    commit = version.code_version()["commit"]
    assert commit and git(repository, "rev-parse", "HEAD").startswith(commit)
    (repository / "version.py").write_text("two")
    assert version.code_version()["commit"] == commit  # what runs was read when it started
    version.code_version.cache_clear()
    assert version.code_version()["commit"] == f"{commit}-dirty"


def test_a_tag_does_not_hide_the_commit(repository):
    git(repository, "tag", "-a", "v9", "-m", "v9")
    assert git(repository, "rev-parse", "HEAD").startswith(version.code_version()["commit"])


def test_outside_of_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(version, "__file__", str(tmp_path / "version.py"))
    assert version.code_version()["commit"] is None


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert version.code_version()["commit"] is None


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as context:
        context.setattr(importlib.metadata, "version", missing)
        importlib.reload(version)
        assert version.__version__ is None
    importlib.reload(version)
    assert version.__version__ == importlib.metadata.version("internlm2-jax")
