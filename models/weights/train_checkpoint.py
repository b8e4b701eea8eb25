"""Weights of a training run's checkpoint, without the optimizer state."""

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from models.config import ModelConfig
from models.files import read_json
from models.weights import run_layout
from models.weights.abstract import abstract, named_params
from models.weights.orbax_errors import cause


@dataclasses.dataclass(frozen=True)
class TrainCheckpoint:
    """A checkpoint of a training run.

    Attributes:
      path: directory of the checkpoint, from `run_layout.find_checkpoint`.
      config: the model's architecture.
      tokenizer: fingerprint of the run's tokenizer, or None if the run does not name it.
    """

    path: Path
    config: ModelConfig
    tokenizer: str | None

    def parameters(self) -> Generator[tuple[str, jax.Array]]:
        """Yield (path, parameter in float32 on the default device), one after the other.

        Raises:
          ValueError: the checkpoint is damaged, or does not fit the configuration.

        Memory: one parameter, and the copies that orbax makes of it.
        """
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            for path, like in named_params(abstract(self.config)).items():
                wanted = {run_layout.PARAMS: _nested(path, like)}
                args = ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                )
                state = (self.path / run_layout.STATE).resolve()
                try:
                    restored = checkpointer.restore(state, args=args)
                except Exception as error:  # orbax and tensorstore raise many types
                    raise ValueError(
                        f"cannot read the checkpoint {self.path}: {cause(error)}"
                    ) from error
                yield path, jax.tree.leaves(restored).pop()
                del restored


def read_checkpoint(path: Path) -> TrainCheckpoint:
    """Read the metadata of a training run's checkpoint.

    Args:
      path: directory from `run_layout.find_checkpoint`.

    Raises:
      FileNotFoundError: the metadata is missing.
      ValueError: the metadata is damaged, or of another version.
    """
    file = path / run_layout.RUN / run_layout.METADATA
    identity = read_json(file).get(run_layout.IDENTITY)
    identity = identity if isinstance(identity, dict) else {}
    try:
        config = run_layout.model_of(identity)
    except TypeError as error:
        raise ValueError(f"{file} does not describe a model of this version: {error}") from error
    tokenizer = identity.get(run_layout.TOKENIZER)
    return TrainCheckpoint(path, config, tokenizer if isinstance(tokenizer, str) else None)


def _nested(path: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": x}} for ("a.b", x)."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value
