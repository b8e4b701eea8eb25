"""Git commit of the running code."""

import functools
import os
import subprocess
from pathlib import Path

VARIABLE = "INTERNLM2_JAX_COMMIT"
"""Environment variable with the commit of a copy of the code that has no repository."""


@functools.cache
def commit() -> str | None:
    """Return the short commit hash, with "-dirty" where files of the packages have changed.

    Returns:
      The value of `VARIABLE` where that is set; None outside of a repository.
    """
    if given := os.environ.get(VARIABLE):
        return given
    here = Path(__file__).parent
    try:
        found = _git("rev-parse", "--short", "HEAD", cwd=here)
        # Results, tables and plots do not change the code.
        files = [f":(top){name}" for name in ("jaxattn", "models", "train", "pyproject.toml")]
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *files, cwd=here)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}-dirty" if changed else found


def _git(*words: str, cwd: Path) -> str:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()
