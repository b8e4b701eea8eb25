"""InternLM2 in Flax: architecture, weights, tokenizer, generation."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.config import PRESETS, ModelConfig
    from models.execution import Execution
    from models.internlm2 import InternLM2, init
    from models.weights.load import load, load_hf
    from models.weights.save import save_hf

__all__ = [
    "PRESETS",
    "Execution",
    "InternLM2",
    "ModelConfig",
    "init",
    "load",
    "load_hf",
    "save_hf",
]

_MODULES = {
    "PRESETS": "models.config",
    "Execution": "models.execution",
    "InternLM2": "models.internlm2",
    "ModelConfig": "models.config",
    "init": "models.internlm2",
    "load": "models.weights.load",
    "load_hf": "models.weights.load",
    "save_hf": "models.weights.save",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562).

    A process that needs a tokenizer alone does not import jax: that takes 1.5 s and 200 MB.
    """
    if name == "__version__":
        return importlib.metadata.version("internlm2-jax")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
