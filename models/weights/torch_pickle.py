"""Reader of pytorch_model.bin without PyTorch, which runs no code of the file.

The file is a zip: data.pkl, a pickle of {name: tensor}, and the bytes of each storage. A pickle is
a program that may call any function that it names. This reader allows only the few names that a
dictionary of tensors needs, and substitutes own classes for them, which record the storage, offset,
shape and strides of each tensor and do nothing else.

References:
  docs.python.org/3/library/pickle.html#restricting-globals;
  docs.pytorch.org/docs/stable/notes/serialization.html (the layout of the zip).
"""

import contextlib
import dataclasses
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16)
import numpy as np

from models.files import check_file


class BinFile(contextlib.ExitStack):
    """Reader of one file, one tensor at a time; a context manager that closes the file.

    Attributes:
      shapes: shape of every tensor by name.
      dtypes: dtype of every tensor by name, a numpy name ("bfloat16").

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, encrypted, of another format, or contains anything but
        tensors of floating-point dtypes.
    """

    def __init__(self, path: Path):
        super().__init__()
        check_file(path)
        self._path = path
        try:
            self._zip = self.enter_context(zipfile.ZipFile(path))
        except (*_BROKEN, ValueError, struct.error) as error:
            raise ValueError(
                f"{path} is not a complete zip of torch.save ({error}): download it again, or, if "
                "torch before 1.6 wrote it, save it as safetensors"
            ) from error
        try:
            self._tensors = self._descriptions()
        except BaseException:
            self.close()
            raise
        self.shapes = {name: t.shape for name, t in self._tensors.items()}
        self.dtypes = {name: t.storage.dtype for name, t in self._tensors.items()}

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype that it is stored in."""
        tensor = self._tensors[name]
        dtype = np.dtype(tensor.storage.dtype)
        begin, size = tensor.offset * dtype.itemsize, tensor.extent * dtype.itemsize
        try:
            storage = self._zip.getinfo(f"{self._root}/data/{tensor.storage.key}")
            there = max(0, storage.file_size - begin)
            if there < size:
                raise ValueError(
                    f"{self._path}: {name} needs {size} bytes, its storage has {there}"
                )
            with self._zip.open(storage) as file:
                if begin:
                    file.seek(begin)
                data = file.read(size)
        except _BROKEN as error:
            raise ValueError(f"{self._path}: the bytes of {name} are broken: {error}") from error
        if len(data) != size:
            raise ValueError(f"{self._path}: the bytes of {name} are broken: the file is too short")
        strides = [s * dtype.itemsize for s in tensor.stride]
        return np.ndarray(tensor.shape, dtype, buffer=data, strides=strides)

    def _descriptions(self) -> dict[str, "_Tensor"]:
        """Read and check the descriptions of the tensors in data.pkl."""
        found = [n for n in self._zip.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"{self._path} is a zip, but not one of torch.save: no data.pkl in it")
        self._root = found[0].partition("/")[0]
        order = f"{self._root}/byteorder"
        try:
            byteorder = self._zip.read(order) if order in self._zip.namelist() else b"little"
        except _BROKEN as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error
        if byteorder != b"little":
            raise ValueError(f"{self._path} has big-endian numbers: save it as safetensors")
        try:
            with self._zip.open(found[0]) as file:
                state = _Restricted(file).load()
        except _BROKEN as error:
            raise ValueError(f"{self._path} is damaged: {error}") from error
        except Exception as error:  # a broken pickle raises many types
            raise ValueError(f"{self._path} contains more than tensors: {error}") from error
        if not isinstance(state, dict):
            raise ValueError(
                f"{self._path} contains a {type(state).__name__}, must contain a dictionary"
            )
        wrong = [str(n) for n, t in state.items() if not isinstance(n, str) or not _is_tensor(t)]
        if wrong:
            raise ValueError(
                f"{self._path} contains values that are not tensors of "
                f"{', '.join(_STORAGES.values())}: {', '.join(wrong)}"
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
    """Position of a tensor in a storage; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Return the number of elements from the first to the last, inclusive."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))


# Raised by zipfile for a bad CRC, broken deflate, truncation, encryption, unknown compression.
_BROKEN = (KeyError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
_STORAGES = {"FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16"}


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return an own class for a name that a dictionary of tensors needs; refuse other names."""
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
        """Return the storage that the pickle refers to by key."""
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), _, int()):
                return _Storage(dtype, key)
        raise pickle.UnpicklingError(f"it refers to {pid!r:.80}, which is not a storage of weights")


class _Dict(dict):
    """Substitute for OrderedDict; torch sets an attribute _metadata on it."""


def _rebuild_tensor(storage, offset, shape, stride, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor, *_) -> Any:
    return tensor


def _is_tensor(value: Any) -> bool:
    """Return True for a tensor within a storage; numpy does not check strides."""
    if not isinstance(value, _Tensor) or not isinstance(value.storage, _Storage):
        return False
    # A pickle can also set attributes of these classes (BUILD). With the dtype "O" numpy would take
    # the bytes of the file for pointers.
    if value.storage.dtype not in _STORAGES.values() or type(value.storage.key) is not str:
        return False
    if type(value.shape) is not tuple or type(value.stride) is not tuple:
        return False
    numbers = (value.offset, *value.shape, *value.stride)
    return len(value.shape) == len(value.stride) and all(type(n) is int and n >= 0 for n in numbers)
