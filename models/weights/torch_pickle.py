"""A pytorch_model.bin read without PyTorch, and without running anything it contains.

The file is a zip: data.pkl, a pickle of {name: tensor}, and the bytes of each storage beside it,
uncompressed. A pickle is a program that may call whatever it names. The reader here lets it name
the few things that a dictionary of tensors needs, and gives it stand-ins for those: it can do
nothing but describe where each tensor lies.

References:
  docs.python.org/3/library/pickle.html#restricting-globals;
  docs.pytorch.org/docs/stable/notes/serialization.html (the layout of the zip).
"""

import contextlib
import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16)
import numpy as np


class BinFile(contextlib.ExitStack):
    """An open file of tensors; a context manager that closes it. One tensor is read at a time.

    Attributes:
      shapes: shape of every tensor by name.
      dtypes: type of every tensor by name, a numpy name ("bfloat16").

    Raises:
      ValueError: it is truncated, of another format, or holds more than tensors of weights' types.
    """

    def __init__(self, path: Path):
        super().__init__()
        self._path = path
        try:
            self._zip = self.enter_context(zipfile.ZipFile(path))
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} is not a complete zip of torch.save ({error}): download it again, or, if "
                "torch before 1.6 wrote it, save it as safetensors"
            ) from error
        try:
            self._tensors = self._described()
        except BaseException:
            self.close()
            raise
        self.shapes = {name: t.shape for name, t in self._tensors.items()}
        self.dtypes = {name: t.storage.dtype for name, t in self._tensors.items()}

    def tensor(self, name: str) -> np.ndarray:
        """The tensor of this name, in the type it is stored in."""
        tensor = self._tensors[name]
        dtype = np.dtype(tensor.storage.dtype)
        try:
            with self._zip.open(f"{self._root}/data/{tensor.storage.key}") as file:
                if tensor.offset:
                    file.seek(tensor.offset * dtype.itemsize)
                data = file.read(tensor.extent * dtype.itemsize)
        except (KeyError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self._path}: the bytes of {name} are broken: {error}") from error
        if len(data) != tensor.extent * dtype.itemsize:
            raise ValueError(
                f"{self._path}: {name} needs {tensor.extent * dtype.itemsize} bytes, its storage "
                f"has {len(data)}"
            )
        strides = [s * dtype.itemsize for s in tensor.stride]
        return np.ndarray(tensor.shape, dtype, buffer=data, strides=strides)

    def _described(self) -> dict[str, "_Tensor"]:
        """What data.pkl says, once it has been checked."""
        found = [n for n in self._zip.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"{self._path} is a zip, but not one of torch.save: no data.pkl in it")
        self._root = found[0].partition("/")[0]
        order = f"{self._root}/byteorder"
        if order in self._zip.namelist() and self._zip.read(order) != b"little":
            raise ValueError(f"{self._path} has big-endian numbers: save it as safetensors")
        try:
            with self._zip.open(found[0]) as file:
                state = _Restricted(file).load()
        except Exception as error:  # a broken pickle raises nearly anything
            raise ValueError(f"{self._path} holds more than tensors: {error}") from error
        if not isinstance(state, dict):
            raise ValueError(f"{self._path} holds a {type(state).__name__}, must hold a dictionary")
        wrong = [str(n) for n, t in state.items() if not isinstance(n, str) or not _is_tensor(t)]
        if wrong:
            raise ValueError(
                f"{self._path} holds what is not a tensor of {', '.join(_STORAGES.values())}: "
                f"{', '.join(wrong)}"
            )
        return state


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from its first to its last, inclusive."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


_STORAGES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for the names that a dictionary of tensors needs, and no others."""
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        allowed = {
            ("collections", "OrderedDict"): _Dict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """A storage, which the pickle refers to by key."""
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), _, int()):
                return _Storage(dtype, key)
        raise pickle.UnpicklingError(f"it refers to {pid!r:.80}, which is not a storage of weights")


class _Dict(dict):
    """An OrderedDict's stand-in; torch hangs an attribute _metadata on the real one."""


def _rebuild_tensor(storage, offset, shape, stride, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor, *_) -> Any:
    return tensor


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor that lies inside of a storage: numpy trusts strides."""
    if not isinstance(value, _Tensor) or not isinstance(value.storage, _Storage):
        return False
    # A pickle can set what the stand-ins hold, too (BUILD). A dtype of its own would make numpy
    # take the file's bytes for pointers.
    if value.storage.dtype not in _STORAGES.values() or type(value.storage.key) is not str:
        return False
    if type(value.shape) is not tuple or type(value.stride) is not tuple:
        return False
    numbers = (value.offset, *value.shape, *value.stride)
    return len(value.shape) == len(value.stride) and all(type(n) is int and n >= 0 for n in numbers)
