"""Libraries that only some kinds of files need."""

import importlib
from pathlib import Path
from typing import Any


def library(name: str, extra: str, path: Path) -> Any:
    """Imports a library that is not among those that every installation has.

    Raises:
        ValueError: it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{path} needs {name}, which is not installed: pip install 'internlm2-jax[{extra}]'"
        ) from error
