"""The weights of a training run's checkpoint, without its optimizer.

A run writes <out>/checkpoints/<step>/state, orbax with the weights under "params", named as in the
model, and <out>/checkpoints/<step>/run/metadata, JSON whose identity holds the model's config as
"model.<field>".
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from models.config import ModelConfig, RopeScaling
from models.hf_files import read_json
from models.internlm2 import InternLM2
from models.load import abstract, fill, named_params


def find_checkpoint(directory: str | Path) -> Path | None:
    """The checkpoint that a directory is, or a run's latest; None: it is neither."""
    directory = Path(directory)
    if (directory / "state").is_dir() and (directory / "run").is_dir():
        return directory
    checkpoints = directory / "checkpoints"
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    steps = [p for p in found if p.name.isdigit()]
    return max(steps, key=lambda p: int(p.name), default=None)


def load_trained(checkpoint: Path) -> InternLM2:
    """The model of one checkpoint, float32, on the default device.

    Args:
      checkpoint: from `find_checkpoint`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the checkpoint is broken, or does not fit the config that it names.
    """
    config = _config(checkpoint)
    model = abstract(config, mesh=None, dtype=jnp.float32)
    wanted = {"params": _nested(named_params(model))}
    how = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore((checkpoint / "state").resolve(), args=how)
    except Exception as error:  # orbax and tensorstore raise many kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the checkpoint {checkpoint}: {first:.300}") from error
    leaves = {path: _leaf(restored["params"], path) for path in named_params(model)}
    return fill(model, leaves)


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


def _nested(named: Any) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in named.items():
        *owners, name = path.split(".")
        node = tree
        for owner in owners:
            node = node.setdefault(owner, {})
        node[name] = value
    return tree


def _leaf(tree: Any, path: str) -> jax.Array:
    for part in path.split("."):
        tree = tree[part]
    return tree
