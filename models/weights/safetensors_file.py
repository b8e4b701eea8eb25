"""One safetensors file: read, and written, a tensor at a time."""

import contextlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile(contextlib.ExitStack):
    """An open file of tensors; a context manager that closes it.

    Tensors are read, not mapped: a mapped file counts as this process's memory as far as it has
    been looked at, until it is closed.

    Attributes:
      shapes: shape of every tensor by name.
      dtypes: type of every tensor by name, a numpy name ("bfloat16").

    Raises:
      ValueError: it is truncated, not safetensors, or holds a type that weights do not have.
    """

    def __init__(self, path: Path):
        super().__init__()
        try:
            # The library checks the header against the file: every offset below lies inside of it.
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        self._path = path
        self._file = self.enter_context(path.open("rb"))
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self._begin = {name: 8 + length + t["data_offsets"][0] for name, t in header.items()}
        for name, tensor in header.items():
            if tensor["dtype"] not in DTYPES:
                self.close()
                raise ValueError(
                    f"{path}: {name} is stored as {tensor['dtype']}, must be one of "
                    f"{', '.join(DTYPES)}"
                )
        self.shapes = {name: tuple(t["shape"]) for name, t in header.items()}
        self.dtypes = {name: DTYPES[t["dtype"]] for name, t in header.items()}

    def tensor(self, name: str) -> np.ndarray:
        """The tensor of this name, in the type it is stored in."""
        x = np.empty(self.shapes[name], self.dtypes[name])
        self._file.seek(self._begin[name])
        if self._file.readinto(_bytes(x)) != x.nbytes:
            raise ValueError(f"{self._path} became shorter while it was read")
        return x


class SafetensorsWriter(contextlib.ExitStack):
    """A new file whose tensors are written in any order; a context manager that closes it.

    References:
      huggingface.co/docs/safetensors, section "Format".
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str):
        """Creates the file, with its header.

        Args:
          path: the file to create.
          shapes: shape of every tensor by name, in the order in which they will lie.
          dtype: type of all of them, a numpy name.

        Raises:
          OSError: the disk is full, or refuses.
        """
        super().__init__()
        self._shapes, self._dtype = shapes, dtype
        end, offsets = 0, {}
        for name, shape in shapes.items():
            offsets[name] = [end, end := end + size(shape, dtype)]
        # transformers refuses a file that does not say which framework's conventions it follows.
        header: dict = {"__metadata__": {"format": "pt"}} | {
            name: {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": offsets[name]}
            for name, shape in shapes.items()
        }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
        self._begin = {name: 8 + len(encoded) + begin for name, (begin, _) in offsets.items()}
        self._file = self.enter_context(path.open("xb"))
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def put(self, name: str, x: np.ndarray) -> None:
        """Writes one tensor.

        Raises:
          OSError: the disk is full, or refuses.
        """
        assert x.shape == self._shapes[name] and x.dtype == self._dtype, (name, x.shape, x.dtype)
        self._file.seek(self._begin[name])
        self._file.write(_bytes(np.ascontiguousarray(x)))


def size(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _bytes(x: np.ndarray) -> memoryview:
    """Its memory: the buffer protocol does not know bfloat16."""
    return x.reshape(-1).view(np.uint8).data
