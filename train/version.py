"""Which code runs: this project's version and commit, and the libraries that do the arithmetic."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path

LIBRARIES = ("jax", "flax", "optax")


@functools.cache
def code_version() -> dict[str, str | None]:
    """Name to version.

    Returns:
        internlm2-jax: its version, None where it is not installed; commit: as `git describe` has
        it, "-dirty" with changes, None outside of a repository; and each of `LIBRARIES`.
    """
    return {
        "internlm2-jax": _installed("internlm2-jax"),
        "commit": _commit(),
        **{name: _installed(name) for name in LIBRARIES},
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
