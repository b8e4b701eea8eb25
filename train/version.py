"""Version of the running code: the package, its git commit, and the libraries that compute."""

import functools
from importlib.metadata import PackageNotFoundError, version

from jaxattn.commit import commit

LIBRARIES = ("jax", "flax", "optax")

try:
    __version__: str | None = version("internlm2-jax")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = None


@functools.cache
def code_version() -> dict[str, str | None]:
    """Return versions by name.

    Returns:
        internlm2-jax: version, None if not installed; commit, of
        `jaxattn.commit`; and each of `LIBRARIES`.
    """
    return {
        "internlm2-jax": __version__,
        "commit": commit(),
        **{name: version(name) for name in LIBRARIES},
    }
