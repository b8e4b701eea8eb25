"""Version of the running code: the package, its git commit, and the libraries that compute."""

import functools
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("jax", "flax", "optax")

try:
    __version__: str | None = version("internlm2-jax")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = None


@functools.cache
def code_version() -> dict[str, str | None]:
    """Return versions by name.

    Returns:
        internlm2-jax: version, None if not installed; commit: from `git describe`, with "-dirty"
        for changed files, None outside of a repository; and each of `LIBRARIES`.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
        commit = found.stdout.decode().strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "internlm2-jax": __version__,
        "commit": commit,
        **{name: version(name) for name in LIBRARIES},
    }
