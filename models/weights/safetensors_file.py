"""One safetensors file, read or written one tensor at a time."""

import contextlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open

from models.files import check_file

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile(contextlib.ExitStack):
    """Reader of one file; a context manager that closes it.

    Attributes:
      shapes: shape of every tensor by name.
      dtypes: dtype of every tensor by name, a numpy name ("bfloat16").

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, not safetensors, or has a dtype that weights never have.
    """

    def __init__(self, path: Path):
        super().__init__()
        check_file(path)
        try:
            self._file = self.enter_context(safe_open(path, framework="np"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}
        self.shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
        stored = {name: x.get_dtype() for name, x in slices.items()}
        for name, dtype in stored.items():
            if dtype not in DTYPES:
                self.close()
                raise ValueError(
                    f"{path}: {name} is stored as {dtype}, must be one of {', '.join(DTYPES)}"
                )
        self.dtypes = {name: DTYPES[dtype] for name, dtype in stored.items()}

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype that it is stored in."""
        return self._file.get_tensor(name)


class SafetensorsWriter(contextlib.ExitStack):
    """Writer of a new file, tensors in any order; a context manager that closes the file.

    The safetensors library writes only files whose tensors are all in memory.

    References:
      huggingface.co/docs/safetensors, section "Format".
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str):
        """Create the file and write its header: shapes by name, in the order of the file.

        Raises:
          OSError: the file cannot be written, for example because the disk is full.
        """
        super().__init__()
        self._shapes, self._dtype = shapes, dtype
        end, offsets = 0, {}
        for name, shape in shapes.items():
            offsets[name] = [end, end := end + nbytes(shape, dtype)]
        # transformers refuses a file that does not name the framework whose conventions it follows.
        header: dict = {"__metadata__": {"format": "pt"}} | {
            name: {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": offsets[name]}
            for name, shape in shapes.items()
        }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # aligns the tensors
        self._begin = {name: 8 + len(encoded) + begin for name, (begin, _) in offsets.items()}
        self._file = self.enter_context(path.open("xb"))
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def put(self, name: str, x: np.ndarray) -> None:
        """Write one tensor; may raise OSError, as `__init__`."""
        assert x.shape == self._shapes[name] and x.dtype == self._dtype, (name, x.shape, x.dtype)
        self._file.seek(self._begin[name])
        # As bytes, because the buffer protocol has no bfloat16.
        self._file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
