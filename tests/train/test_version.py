"""Version and commit of the code that wrote a checkpoint."""

import importlib
import importlib.metadata
import subprocess

import jax
import pytest

from jaxattn import commit
from train import version


@pytest.fixture(autouse=True)
def fresh():
    """Clear the cache, which lasts for a process, before and after each test."""
    forget()
    yield
    forget()


def forget():
    version.code_version.cache_clear()
    commit.commit.cache_clear()


def git(where, *arguments):
    me = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(where), *me, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    for folder, name in (("train", "version.py"), ("docs", "page.md")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    monkeypatch.setattr(commit, "__file__", str(tmp_path / "train" / "version.py"))
    return tmp_path


def test_libraries_by_version():
    found = version.code_version()
    assert [*found] == ["internlm2-jax", "commit", "jax", "flax", "optax"]
    assert found["jax"] == jax.__version__


def test_the_commit_and_whether_files_differ_from_it(repository):
    found = version.code_version()["commit"]
    assert found and git(repository, "rev-parse", "HEAD").startswith(found)
    (repository / "docs" / "page.md").write_text("two")
    forget()
    assert version.code_version()["commit"] == found  # a page is no code
    (repository / "train" / "version.py").write_text("two")
    assert version.code_version()["commit"] == found  # what runs was read when it started
    forget()
    assert version.code_version()["commit"] == f"{found}-dirty"


def test_results_are_not_code(repository):
    """A bench that writes its results does not change the commit of its next cells."""
    (repository / "results").mkdir()
    (repository / "results" / "a.json").write_text("{}")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "results")
    (repository / "results" / "a.json").write_text("[]")
    assert git(repository, "rev-parse", "HEAD").startswith(version.code_version()["commit"])


def test_a_copy_without_a_repository_can_name_its_commit(monkeypatch):
    monkeypatch.setenv(commit.VARIABLE, "abc")
    assert version.code_version()["commit"] == "abc"


def test_a_tag_does_not_hide_the_commit(repository):
    git(repository, "tag", "-a", "v9", "-m", "v9")
    assert git(repository, "rev-parse", "HEAD").startswith(version.code_version()["commit"])


def test_outside_of_a_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(commit, "__file__", str(tmp_path / "train" / "version.py"))
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
