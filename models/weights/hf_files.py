"""A directory of HF weights: which tensors it holds, and all of them, one after the other."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from models.weights.safetensors_file import SafetensorsFile
from models.weights.torch_pickle import BinFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


def eos_ids(path: Path) -> list[int]:
    """The eos ids that a config.json or generation_config.json names; none without the file.

    Raises:
      ValueError: it names something else.
    """
    named = read_json(path).get("eos_token_id") if path.exists() else None
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: eos_token_id={named!r} must be an id, a list of ids, or null")
    return ids


class HFDirectory:
    """The config and tensors of a local HF checkpoint: safetensors, or PyTorch's .bin files.

    Where both lie there, safetensors is read.

    Attributes:
      config: contents of config.json.
      shapes: shape of every tensor by name.
      dtypes: type of every tensor by name, a numpy name ("bfloat16").

    Raises:
      FileNotFoundError: no such directory, no config.json, no weights, or an absent shard.
      ValueError: a file is not what its name says, truncated, or holds other types.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a directory with a HF checkpoint")
        self.config = read_json(self.path / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._names: dict[str, list[str]] = {}
        shards, indexed = self._shards()
        for shard in shards:
            self._look_into(shard)
        if absent := sorted(indexed - self.shapes.keys()):
            raise ValueError(
                f"the index in {self.path} names tensors that its files lack: {', '.join(absent)}"
            )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        """These tensors, in the type they are stored in, in the order of the files.

        One file is open at a time, and one tensor is held.
        """
        for shard, held in self._names.items():
            if wanted := [n for n in held if n in names]:
                with _open(self.path / shard) as file:
                    for name in wanted:
                        yield name, file.tensor(name)

    def _shards(self) -> tuple[list[str], set[str]]:
        """(names of the files with weights, names of the tensors that an index promises)."""
        for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
            if (self.path / index).exists():
                weight_map = read_json(self.path / index).get("weight_map")
                if not isinstance(weight_map, dict):
                    raise ValueError(f"{self.path / index} has no weight_map")
                shards = sorted(set(weight_map.values()))
                if absent := [s for s in shards if not (self.path / s).exists()]:
                    raise FileNotFoundError(
                        f"{self.path / index} names absent files: {', '.join(absent)}"
                    )
                return shards, set(weight_map)
            if (self.path / single).exists():
                return [single], set()
        raise FileNotFoundError(
            f"{self.path} has neither {SINGLE} nor {INDEX} nor {BIN_SINGLE} nor {BIN_INDEX}"
        )

    def _look_into(self, shard: str) -> None:
        path = self.path / shard
        with _open(path) as file:
            if twice := sorted(file.shapes.keys() & self.shapes.keys()):
                raise ValueError(f"{path} holds {twice[0]}, which another file holds too")
            self.shapes |= file.shapes
            self.dtypes |= file.dtypes
            self._names[shard] = list(file.shapes)


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


def _open(path: Path) -> SafetensorsFile | BinFile:
    return BinFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
