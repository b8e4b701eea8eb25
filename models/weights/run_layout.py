"""File layout of a training run, as far as models and train share it.

A run writes, for each checkpoint, `<out>/checkpoints/<step>/state`, an orbax checkpoint with the
weights under "params" and the names of the model's parameters, and
`<out>/checkpoints/<step>/run/metadata`, JSON. Its "identity" contains the model's configuration as
"model.<field>" and the fingerprint of the tokenizer. Its "config" contains the flags in use: in
"export_layout" the layout of exports, by default that of the weights that the run began from.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.rope_scaling import RopeScaling

CHECKPOINTS = "checkpoints"
STATE = "state"
RUN = "run"
METADATA = "metadata"
PARAMS = "params"
IDENTITY = "identity"
TOKENIZER = "tokenizer"
LORA = "lora"
_MODEL = "model."


def find_checkpoint(directory: str | Path) -> Path | None:
    """Return a checkpoint directory itself, or the latest checkpoint of a run; None for others."""
    directory = Path(directory)
    if (directory / STATE).is_dir() and (directory / RUN).is_dir():
        return directory
    checkpoints = directory / CHECKPOINTS
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    steps = [p for p in found if p.name.isdecimal()]
    return max(steps, key=lambda p: int(p.name), default=None)


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a model's configuration as entries of a run's identity."""
    return {_MODEL + name: value for name, value in dataclasses.asdict(config).items()}


def model_of(identity: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that `model_identity` wrote into a run's identity.

    Raises:
      TypeError: a field is missing, unknown or of another type.
      ValueError: a value is out of its range.
    """
    fields = {k.removeprefix(_MODEL): v for k, v in identity.items() if k.startswith(_MODEL)}
    if fields.get("rope_scaling"):
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(**fields)
