"""Weights of a training run's checkpoint, without the optimizer state."""

import dataclasses
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from models.block import LINEAR
from models.config import ModelConfig
from models.execution import Execution
from models.files import read_json
from models.lora import LoRA, adapter_params
from models.weights import run_layout
from models.weights.abstract import abstract, named_params
from models.weights.adapter_files import AdapterParams, load_adapter
from models.weights.orbax_errors import cause


@dataclasses.dataclass(frozen=True)
class TrainCheckpoint:
    """A checkpoint of a training run.

    Attributes:
      path: directory of the checkpoint, from `run_layout.find_checkpoint`.
      config: the model's architecture.
      tokenizer: fingerprint of the run's tokenizer, or None if the run does not name it.
      lora: adapters, whose arrays are then the only weights in the checkpoint; None: all weights.
      base: the model that the adapters belong to, as the run's --model named it.
      tokenizer_spec: the run's tokenizer as `models.tokenizer.load_tokenizer` takes it.
    """

    path: Path
    config: ModelConfig
    tokenizer: str | None
    lora: LoRA | None = None
    base: str | None = None
    tokenizer_spec: str | None = None

    def parameters(
        self, like: Mapping[str, jax.ShapeDtypeStruct] | None = None
    ) -> Generator[tuple[str, jax.Array]]:
        """Yield (path, parameter), one after the other.

        Args:
          like: dtypes and shardings by path; None: float32 on the default device.

        Raises:
          ValueError: the checkpoint is damaged, or does not fit the configuration.

        Memory: one parameter, and the copies that orbax makes of it.
        """
        yield from self._read(like or named_params(abstract(self.config)))

    def adapter(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return (A [L, *in, R], B [L, R, *out]) by target, float32, of a run with adapters.

        Raises:
          ValueError: the checkpoint is damaged, or has no adapters.
        """
        if self.lora is None:
            raise ValueError(f"{self.path} has all weights of a model, and no adapters")
        adapters = adapter_params(abstract(self.config, Execution(lora=self.lora)))
        paths = {
            f"blocks.{LINEAR[target][0]}.lora.{target}.{name}": like
            for target, pair in adapters.items()
            for name, like in zip("ab", pair, strict=True)
        }
        arrays = [np.asarray(value) for _, value in self._read(paths)]
        return dict(zip(adapters, zip(arrays[::2], arrays[1::2], strict=True), strict=True))

    def check_base(self, config: ModelConfig) -> None:
        """Check that the adapters belong to a base model.

        Raises:
          ValueError: names the fields in which the architectures differ.
        """
        if changed := self.config.differences(config):
            raise ValueError(
                f"{self.path} has adapters of another base model: {', '.join(changed)} differ"
            )

    def _read(self, paths: Mapping[str, Any]) -> Generator[tuple[str, jax.Array]]:
        """Yield (path, array) for structs by path."""
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            for path, like in paths.items():
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
    """Read the metadata of a training run's checkpoint, from `run_layout.find_checkpoint`.

    Raises:
      FileNotFoundError: the metadata is missing.
      ValueError: the metadata is damaged, or of another version.
    """
    file = path / run_layout.RUN / run_layout.METADATA
    content = read_json(file)
    identity = content.get(run_layout.IDENTITY)
    identity = identity if isinstance(identity, dict) else {}
    lora = identity.get(run_layout.LORA)
    try:
        config = run_layout.model_of(identity)
        if lora is not None:
            lora = LoRA(**lora | {"targets": tuple(lora["targets"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{file} does not describe a model of this version: {error}") from error
    tokenizer = identity.get(run_layout.TOKENIZER)
    tokenizer = tokenizer if isinstance(tokenizer, str) else None
    flags = content.get("config")
    flags = flags if isinstance(flags, dict) else {}
    return TrainCheckpoint(
        path, config, tokenizer, lora, flags.get("model"), flags.get("tokenizer")
    )


def find_run(directory: Path) -> TrainCheckpoint | None:
    """Read the latest checkpoint of a run, or a checkpoint directory itself; None for others.

    Raises:
      FileNotFoundError, ValueError: as of `read_checkpoint`.
    """
    found = run_layout.find_checkpoint(directory)
    return read_checkpoint(found) if found else None


def read_adapter(directory: Path, config: ModelConfig) -> tuple[LoRA, AdapterParams]:
    """Read the adapters in a PEFT directory, or of a run or its checkpoint, as `load_adapter`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, the run has no adapters, or they belong to another base model.
    """
    run = find_run(directory)
    if run is None:
        return load_adapter(directory, config)
    params = run.adapter()  # raises if there are none
    assert run.lora is not None
    run.check_base(config)
    return run.lora, params


def _nested(path: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": x}} for ("a.b", x)."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value
