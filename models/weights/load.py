"""A HF checkpoint tensor by tensor into sharded device arrays."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from jaxattn.device import default_device
from models import sharding
from models.config import ModelConfig
from models.internlm2 import InternLM2
from models.weights.abstract import abstract, fill
from models.weights.hf_files import HFDirectory
from models.weights.orbax_checkpoint import is_converted, load_orbax
from models.weights.table import Weight, hf_tensors, is_known_extra, resolve, table
from models.weights.train_checkpoint import find_checkpoint


def load(directory: str | Path, **kwargs: Any) -> InternLM2:
    """The model of a HF directory (`load_hf`) or of a converted one (`load_orbax`).

    Raises:
      ValueError: it is a training run; or as those.
    """
    directory = Path(directory)
    if not is_converted(directory) and find_checkpoint(directory) is not None:
        raise ValueError(
            f"{directory} is a training run: python -m models.convert {directory} DIR "
            "--assets_from HF_DIR makes weights of it"
        )
    return (load_orbax if is_converted(directory) else load_hf)(directory, **kwargs)


def load_hf(
    directory: str | Path,
    *,
    dtype: Any = "bfloat16",
    param_dtype: Any = None,
    attn: str = "auto",
    mesh: Mesh | None = None,
    remat: str = "full",
    progress: bool = False,
) -> InternLM2:
    """Reads a local HF InternLM2 checkpoint: config.json and weights, one file or sharded.

    The weights are safetensors or pytorch_model*.bin, of which no code is run.

    Args:
      directory: where it lies.
      dtype: type of compute.
      param_dtype: type of the stored weights; None: dtype. Training wants "float32".
      attn: attention implementation, a name that `jaxattn.attention` knows.
      mesh: the devices to spread the weights over; None: the default device.
      remat: as for `InternLM2`.
      progress: show a progress bar.

    Returns:
      The model.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the config is not InternLM2's, or tensors are missing, unknown or misshapen (all
        of them named at once), or the mesh does not divide the model.

    Memory: on the host one tensor (of a mesh of several devices, and its parts); on devices the
    model and one tensor, as it is stored and as it will be used.
    """
    files = HFDirectory(directory)
    config = ModelConfig.from_hf(files.config)
    _check_tensors(files, config)
    model = abstract(
        config, mesh=mesh, dtype=dtype, param_dtype=param_dtype, attn=attn, remat=remat
    )
    rows = {name: (weight, i) for name, weight, i in hf_tensors(config)}
    slots = {weight.path: _Slot(model, weight, mesh) for weight in table(config)}
    # In the order of the files: a disk reads best from front to back.
    tensors = tqdm(
        files.read(rows), desc="loading", total=len(rows), unit="tensor", disable=not progress
    )
    for name, x in tensors:
        weight, i = rows[name]
        slots[weight.path].put(x, 0 if i is None else i)
    return fill(model, {path: slot.value for path, slot in slots.items()})


def hf_parameters(
    directory: str | Path, *, progress: bool = False
) -> tuple[ModelConfig, str, Iterator[tuple[str, jax.Array]]]:
    """The parameters of a HF checkpoint one after the other, for a model too large for memory.

    Args:
      directory: as for `load_hf`.
      progress: show a progress bar.

    Returns:
      The config; the widest type among the tensors, so that none is rounded; and an iterator of
      (path, parameter in that type, on the default device).

    Raises:
      FileNotFoundError, ValueError: as `load_hf`.

    Memory: one parameter, of all layers where they are stacked, and one tensor; a caller that
    still holds the last one when it asks for the next holds two.
    """
    files = HFDirectory(directory)
    config = ModelConfig.from_hf(files.config)
    _check_tensors(files, config)
    types = set(files.dtypes.values())
    dtype = types.pop() if len(types) == 1 else "float32"
    model = abstract(config, mesh=None, dtype=dtype)
    layers: dict[Weight, dict[str, int | None]] = {}
    for name, weight, i in hf_tensors(config):
        layers.setdefault(weight, {})[name] = i

    def parameters():
        total = sum(len(names) for names in layers.values())
        with tqdm(desc="loading", total=total, unit="tensor", disable=not progress) as bar:
            for weight, names in layers.items():
                slot = _Slot(model, weight, None)
                for name, x in files.read(names):
                    slot.put(x, names[name] or 0)
                    bar.update()
                value = slot.value
                del slot  # nothing but the caller holds it now
                yield weight.path, value
                del value

    return config, dtype, parameters()


def _check_tensors(files: HFDirectory, config: ModelConfig) -> None:
    """Every tensor is there, is known, and has its shape; or one error names all that are not."""
    expected = {name: weight.hf_shape(config) for name, weight, _ in hf_tensors(config)}
    found = {n: s for n, s in files.shapes.items() if not is_known_extra(n, config)}
    problems = {
        "missing": [f"{n} {list(s)}" for n, s in expected.items() if n not in found],
        "unknown": [f"{n} {list(s)}" for n, s in found.items() if n not in expected],
        "of another shape than config.json says": [
            f"{n} {list(found[n])} instead of {list(s)}"
            for n, s in expected.items()
            if n in found and found[n] != s
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"tensors of {files.path} do not fit its config.json; {told}")


class _Slot:
    """A parameter that is being filled, with what it takes to put a HF tensor into it."""

    def __init__(self, model: InternLM2, weight: Weight, mesh: Mesh | None):
        owner, name = resolve(model, weight.path)
        param = getattr(owner, name)
        axes = sharding.weight_axes(param)[int(weight.stacked) :]
        # Merged axes are split by the first of them, the outermost: only that is ever sharded.
        logical = dict(zip(weight.axes, axes, strict=True))
        self._at: Any = default_device()
        if mesh is not None:
            outer = [logical[dim[0]] for dim in weight.hf_axes.split(",")]
            self._at = NamedSharding(mesh, sharding.spec(outer, mesh))
        self._place = _placer(weight, logical, model.config, param.dtype)
        self.value: Any = None
        if weight.stacked:
            self.value = jax.jit(
                functools.partial(jnp.zeros, param.shape, param.dtype),
                out_shardings=param.get_value().sharding,
            )()

    def put(self, x: np.ndarray, layer: int) -> None:
        """Writes one layer, or the whole of a parameter that is not stacked."""
        # As it is stored, and already split the way its parameter is.
        on_device = jax.device_put(x, self._at)
        # Waiting keeps what is under way, and so the host's memory, to one tensor.
        self.value = jax.block_until_ready(self._place(self.value, on_device, jnp.int32(layer)))


def _placer(weight: Weight, logical: Mapping[str, str | None], config: ModelConfig, dtype: Any):
    """Jitted (parameter, HF tensor, layer) -> parameter with that layer written, in place.

    A parameter that is not stacked is None before.
    """

    def place(value, x, layer):
        with sharding.mesh_of(x):
            mesh = jax.sharding.get_abstract_mesh()
            kwargs = {}
            if not mesh.empty:
                flat = weight.hf_axes.replace(",", "")
                kwargs = {"out_sharding": sharding.spec([logical[a] for a in flat], mesh)}
            x = weight.from_hf(x, config, **kwargs).astype(dtype)
            if not weight.stacked:
                return x
            return jax.lax.dynamic_update_index_in_dim(value, x, layer, 0)

    return jax.jit(place, donate_argnums=0)
