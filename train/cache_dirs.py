"""Cache directories: one place for the token cache and for XLA's compilation cache.

References:
    XDG Base Directory Specification: an empty or relative $XDG_CACHE_HOME counts as unset.
"""

import os
from pathlib import Path


def token_cache() -> Path:
    """Return the default directory of token caches."""
    return _cache_home() / "tokens"


def compilation_cache() -> Path:
    """Return the default directory of compiled programs."""
    return _cache_home() / "xla"


def _cache_home() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()
    return base / "internlm2-jax"
