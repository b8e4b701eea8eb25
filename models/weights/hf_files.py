"""HF checkpoints as files: config.json, names and shapes of the tensors, reading of tensors."""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from models.files import read_json
from models.weights.safetensors_file import SafetensorsFile
from models.weights.torch_pickle import BinFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


def eos_ids(path: Path) -> list[int]:
    """Return the eos ids in a config.json or generation_config.json; [] without the file.

    Raises:
      ValueError: the value is not an id, a list of ids, or null.
    """
    named = read_json(path).get("eos_token_id") if path.exists() else None
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: eos_token_id={named!r} must be an id, a list of ids, or null")
    return ids


class HFDirectory:
    """Config and tensors of a local HF checkpoint: safetensors, or PyTorch's .bin files.

    If a directory has both, safetensors is read.

    Attributes:
      config: contents of config.json.
      shapes: shape of every tensor by name.
      dtypes: dtype of every tensor by name, a numpy name ("bfloat16").

    Raises:
      FileNotFoundError: the directory, config.json, the weights or a shard is missing.
      ValueError: a file is damaged or has an unsupported dtype.
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
            self._read_header(shard)
        if absent := sorted(indexed - self.shapes.keys()):
            raise ValueError(
                f"the index in {self.path} names tensors that its files lack: {', '.join(absent)}"
            )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield these tensors, in the dtype that they are stored in, in the order of the files.

        One file is open at a time, and one tensor is in memory.
        """
        for shard, inside in self._names.items():
            if wanted := [n for n in inside if n in names]:
                with _open(self.path / shard) as file:
                    for name in wanted:
                        yield name, file.tensor(name)

    def _shards(self) -> tuple[list[str], set[str]]:
        """Return (names of the weights files, names of the tensors in the index)."""
        for index, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
            if (self.path / index).exists():
                weight_map = read_json(self.path / index).get("weight_map")
                if not isinstance(weight_map, dict):
                    raise ValueError(f"{self.path / index} has no weight_map")
                for name, shard in weight_map.items():
                    if not isinstance(shard, str) or not shard or Path(shard).name != shard:
                        raise ValueError(
                            f"{self.path / index}: weight_map[{name!r:.80}]={shard!r:.80} must be "
                            "the name of a file in the same directory"
                        )
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

    def _read_header(self, shard: str) -> None:
        path = self.path / shard
        with _open(path) as file:
            if twice := sorted(file.shapes.keys() & self.shapes.keys()):
                raise ValueError(f"{path} contains {twice[0]}, and another file does too")
            self.shapes |= file.shapes
            self.dtypes |= file.dtypes
            self._names[shard] = list(file.shapes)


def _open(path: Path) -> SafetensorsFile | BinFile:
    return BinFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
