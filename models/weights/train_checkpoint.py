"""The weights of a training run's checkpoint, without its optimizer.

A run writes <out>/checkpoints/<step>/state, orbax with the weights under "params", named as in the
model, and <out>/checkpoints/<step>/run/metadata, JSON whose identity holds the model's config as
"model.<field>".
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from models.config import ModelConfig, RopeScaling
from models.weights.abstract import abstract, named_params
from models.weights.hf_files import read_json


def find_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint that a directory is, or a run's latest; None: it is neither."""
    directory = Path(directory)
    if (directory / "state").is_dir() and (directory / "run").is_dir():
        return directory
    checkpoints = directory / "checkpoints"
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    steps = [p for p in found if p.name.isdigit()]
    return max(steps, key=lambda p: int(p.name), default=None)


def trained_parameters(
    checkpoint: Path,
) -> tuple[ModelConfig, str, Iterator[tuple[str, jax.Array]]]:
    """The parameters of a checkpoint, one after the other, as `models.weights.load.hf_parameters`.

    Args:
      checkpoint: from `find_checkpoint`.

    Returns:
      The config, "float32", and an iterator of (path, parameter on the default device).

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the checkpoint is broken, or does not fit the config that it names.

    Memory: one parameter, and what orbax copies of it.
    """
    config = _config(checkpoint)
    return config, "float32", _read(checkpoint, config)


def _read(checkpoint: Path, config: ModelConfig) -> Iterator[tuple[str, jax.Array]]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for path, like in named_params(abstract(config, mesh=None, dtype=jnp.float32)).items():
            wanted = {"params": _nested(path, like)}
            how = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )
            try:
                restored = checkpointer.restore((checkpoint / "state").resolve(), args=how)
            except Exception as error:  # orbax and tensorstore raise many kinds
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"cannot read the checkpoint {checkpoint}: {first:.300}"
                ) from error
            yield path, jax.tree.leaves(restored).pop()
            del restored


def _config(checkpoint: Path) -> ModelConfig:
    path = checkpoint / "run" / "metadata"
    identity = read_json(path).get("identity")
    fields: dict[str, Any] = {
        name.removeprefix("model."): value
        for name, value in (identity if isinstance(identity, dict) else {}).items()
        if name.startswith("model.")
    }
    try:
        if fields.get("rope_scaling"):
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        return ModelConfig(**fields)
    except TypeError as error:
        raise ValueError(f"{path} does not describe a model of this version: {error}") from error


def _nested(path: str, value: Any) -> dict[str, Any]:
    """("a.b", x) -> {"a": {"b": x}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value
