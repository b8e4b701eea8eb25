"""One safetensors file: read, and written, a tensor at a time."""

import contextlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16, which safetensors then returns)
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile(contextlib.ExitStack):
    """An open file of tensors; a context manager that closes it.

    The file is mapped into memory: what has been read stays there until it is closed, at most the
    file's size.

    Attributes:
      shapes: shape of every tensor by name.
      dtypes: type of every tensor by name, a numpy name ("bfloat16").

    Raises:
      ValueError: it is truncated, not safetensors, or holds a type that weights do not have.
    """

    def __init__(self, path: Path):
        super().__init__()
        try:
            self._file = self.enter_context(safe_open(path, framework="np"))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in self._file.keys():  # noqa: SIM118  (not a dict)
            part = self._file.get_slice(name)
            self.shapes[name] = tuple(part.get_shape())
            if part.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{path}: {name} is stored as {part.get_dtype()}, must be one of "
                    f"{', '.join(DTYPES)}"
                )
            self.dtypes[name] = DTYPES[part.get_dtype()]

    def tensor(self, name: str) -> np.ndarray:
        """The tensor of this name, in the type it is stored in."""
        return self._file.get_tensor(name)


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterable[np.ndarray],
) -> None:
    """Writes a file whose tensors are never all in memory.

    Args:
      path: the file to create.
      shapes: shape of every tensor by name.
      dtype: type of all of them, a numpy name.
      tensors: the tensors in the order of shapes; each may be made when it is asked for.

    Raises:
      OSError: the disk is full, or refuses.

    References:
      huggingface.co/docs/safetensors, section "Format".
    """
    end = 0
    # transformers refuses a file that does not say which framework's conventions it follows.
    header: dict = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        begin, end = end, end + size(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (name, shape), x in zip(shapes.items(), tensors, strict=True):
            assert x.shape == shape and x.dtype == dtype, (name, x.shape, x.dtype)
            # Through bytes: the buffer protocol does not know bfloat16.
            file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


def size(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
