"""A directory of HF weights, opened: which tensors it holds, and each of them when asked for."""

import contextlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class HFDirectory(contextlib.ExitStack):
    """The config and tensors of a local HF checkpoint; a context manager that closes its files.

    Tensors are read one at a time from memory-mapped files: nothing is held that was not asked
    for.

    Attributes:
      config: contents of config.json.
      shapes: shape of every tensor by name.
      dtypes: type of every tensor by name, a numpy name ("bfloat16").

    Raises:
      FileNotFoundError: no such directory, no config.json, no weights, or an absent shard.
      ValueError: a file is not what its name says, truncated, or not safetensors.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a directory with a HF checkpoint")
        self.config = read_json(self.path / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "HFDirectory":
        super().__enter__()
        try:
            for name in self._shards():
                self._open(name)
            self._check_index()
        except BaseException:
            self.close()
            raise
        return self

    def tensor(self, name: str) -> np.ndarray:
        """The tensor of this name, in the type it is stored in."""
        return self._files[name].get_tensor(name)

    def _shards(self) -> list[str]:
        """File names that hold the weights."""
        index = self.path / INDEX
        if index.exists():
            shards = sorted(set(self._weight_map().values()))
            if absent := [s for s in shards if not (self.path / s).exists()]:
                raise FileNotFoundError(f"{index} names absent files: {', '.join(absent)}")
            return shards
        if (self.path / SINGLE).exists():
            return [SINGLE]
        if found := sorted(p.name for p in self.path.glob("pytorch_model*.bin")):
            raise ValueError(
                f"{self.path} holds {found[0]}, which is not read here: save it as safetensors"
            )
        raise FileNotFoundError(f"{self.path} has neither {SINGLE} nor {INDEX}")

    def _weight_map(self) -> dict[str, str]:
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{self.path / INDEX} has no weight_map")
        return weight_map

    def _open(self, shard: str) -> None:
        path = self.path / shard
        try:
            file = self.enter_context(safe_open(path, framework="np"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118  (not a dict)
            if name in self._files:
                raise ValueError(f"{path} holds {name}, which another file holds too")
            part = file.get_slice(name)
            self.shapes[name] = tuple(part.get_shape())
            if part.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{path}: {name} is stored as {part.get_dtype()}, must be one of "
                    f"{', '.join(DTYPES)}"
                )
            self.dtypes[name] = DTYPES[part.get_dtype()]
            self._files[name] = file

    def _check_index(self) -> None:
        if not (self.path / INDEX).exists():
            return
        if absent := sorted(self._weight_map().keys() - self.shapes.keys()):
            raise ValueError(
                f"{self.path / INDEX} names tensors that its files lack: {', '.join(absent)}"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a JSON object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value
