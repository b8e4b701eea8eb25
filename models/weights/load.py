"""Loading of HF checkpoints into sharded device arrays, one tensor at a time."""

import dataclasses
import functools
from collections.abc import Collection, Generator, Iterator, Mapping
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
from models.execution import INFERENCE, Execution
from models.files import read_json
from models.internlm2 import InternLM2, with_new_adapters
from models.lora import with_adapter_params
from models.quantize import is_quantized, quantize_like
from models.weights import llama
from models.weights.abstract import abstract, fill, named_params
from models.weights.hf_files import BIN_INDEX, BIN_SINGLE, INDEX, SINGLE, HFDirectory
from models.weights.orbax_checkpoint import fill_with, is_orbax, load_orbax
from models.weights.table import Weight, find_param, hf_tensors, is_known_extra, table
from models.weights.train_checkpoint import TrainCheckpoint, find_run, read_adapter

MOST_NAMED = 20  # tensors in an error message

Stored = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Names and shapes of the tensors in the files by the name of their InternLM2 tensor."""


def load(
    directory: str | Path,
    *,
    execution: Execution = INFERENCE,
    mesh: Mesh | None = None,
    progress: bool = False,
    adapter: Path | None = None,
    seed: int = 0,
) -> InternLM2:
    """Load a HF directory (`load_hf`), an orbax directory (`load_orbax`), or a training run.

    The weights of a run are those of its latest checkpoint; a run with adapters is loaded with its
    base model. With `adapter`, a PEFT directory or a run, the model has its adapters:
    `execution.lora` is then replaced, and a run brings its rotary scaling. Otherwise
    `execution.lora` gets new adapters, which are drawn from `seed`.

    Raises:
      ValueError: the directory is a LoRA adapter, or a run whose base model is not there; or as for
        `load_hf` and `load_orbax`.
    """
    directory = Path(directory)
    run = None if is_orbax(directory) else find_run(directory)
    if run is not None and run.lora is not None:
        base = _base(directory, run, adapter)
        return load(base, execution=execution, mesh=mesh, progress=progress, adapter=directory)
    if run is None:
        check_loadable(directory)
    params = None
    if adapter is not None:
        hf = directory / "config.json"
        config = ModelConfig.from_hf(read_json(hf)) if run is None else run.config
        lora, params = read_adapter(adapter, config)
        execution = dataclasses.replace(execution, lora=lora)
    if run is not None:
        read = functools.partial(_parameters, run)
        model = fill_with(read, run.config, execution=execution, mesh=mesh, seed=seed)
    else:
        loader = load_orbax if is_orbax(directory) else load_hf
        model = loader(directory, execution=execution, mesh=mesh, progress=progress, seed=seed)
    if adapter is None or params is None:
        return model
    if trained := find_run(adapter):  # with its --rope_factor
        scaling = trained.config.rope_scaling
        model.config = dataclasses.replace(model.config, rope_scaling=scaling)
    return with_adapter_params(model, params)


def _base(directory: Path, run: TrainCheckpoint, adapter: Path | None) -> Path:
    """Return the directory of the base model of a run with adapters."""
    if adapter is not None:
        raise ValueError(f"{directory} has adapters of its own: give the base model {run.base}")
    if run.base is None or not Path(run.base).is_dir():
        raise ValueError(
            f"{directory} has adapters only, and no directory {run.base} is here, which is their "
            f"base model: python -m models.generate BASE --adapter {directory}"
        )
    return Path(run.base)


def _parameters(run: TrainCheckpoint, stored: InternLM2) -> Generator[tuple[str, jax.Array]]:
    return run.parameters(named_params(stored))


def check_loadable(directory: Path) -> None:
    """Check that a directory is not a LoRA adapter, which people take for weights by mistake.

    Raises:
      ValueError: it is one.
    """
    names = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
    if "adapter_config.json" in names and not names & {SINGLE, INDEX, BIN_SINGLE, BIN_INDEX}:
        raise ValueError(
            f"{directory} contains a LoRA adapter (adapter_config.json), not the weights of a "
            f"model: take BASE --adapter={directory} to generate, --model=BASE --lora.adapter="
            f"{directory} to train, or python -m models.convert {directory} DIR --merge BASE"
        )


def load_hf(
    directory: str | Path,
    *,
    execution: Execution = INFERENCE,
    mesh: Mesh | None = None,
    progress: bool = False,
    seed: int = 0,
) -> InternLM2:
    """Load a local HF InternLM2 checkpoint: config.json and weights, one file or sharded.

    A checkpoint in Llama's layout loads alike: q, k and v of a layer become wqkv. The weights are
    safetensors or pytorch_model*.bin; no code in them is run.

    Args:
      directory: directory of the checkpoint.
      execution: dtypes, attention implementation, rematerialization, scan. Training wants
        param_dtype="float32".
      mesh: devices to shard the weights over; None: the default device.
      progress: show a progress bar.
      seed: of the new adapters, if `execution.lora` asks for adapters.

    Returns:
      The model.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the config is not of InternLM2, or tensors are missing, unknown or of another
        shape (one message names them), or the mesh does not divide the model.

    Memory: on the host one tensor, or q, k and v of a layer (on a mesh of several devices, and its
    shards); on devices the model and one tensor, in its stored and in its final dtype.
    """
    files = HFDirectory(directory)
    config = ModelConfig.from_hf(files.config)
    stored = _check_tensors(files, config)
    model = abstract(config, execution, mesh=mesh)
    rows = {name: (weight, i) for name, weight, i in hf_tensors(config)}
    slots = {weight.path: _Slot(model, weight, mesh) for weight in table(config)}
    # In the order of the files, because a disk reads best from front to back.
    tensors = tqdm(
        _read(files, stored, config, rows),
        desc="loading",
        total=len(rows),
        unit="tensor",
        disable=not progress,
    )
    for name, x in tensors:
        weight, i = rows[name]
        slots[weight.path].put(x, 0 if i is None else i)
    model = fill(model, {path: slot.value for path, slot in slots.items()})
    return with_new_adapters(model, seed=seed, mesh=mesh)


def hf_parameters(
    directory: str | Path, *, progress: bool = False
) -> tuple[ModelConfig, str, Generator[tuple[str, jax.Array]]]:
    """Read the parameters of a HF checkpoint one after the other, for models larger than memory.

    Returns:
      The config; the widest dtype among the tensors, so that none is rounded; and an iterator of
      (path, parameter in this dtype, on the default device).

    Raises:
      FileNotFoundError, ValueError: as for `load_hf`.

    Memory: one parameter, of all layers if they are stacked, and one tensor. A caller that still
    refers to a parameter when it asks for the next needs memory for two.
    """
    files = HFDirectory(directory)
    config = ModelConfig.from_hf(files.config)
    stored = _check_tensors(files, config)
    dtypes = set(files.dtypes.values())
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    model = abstract(config, Execution(param_dtype=dtype))
    layers: dict[Weight, dict[str, int | None]] = {}
    for name, weight, i in hf_tensors(config):
        layers.setdefault(weight, {})[name] = i

    def parameters():
        total = sum(len(names) for names in layers.values())
        with tqdm(desc="loading", total=total, unit="tensor", disable=not progress) as bar:
            for weight, names in layers.items():
                slot = _Slot(model, weight, None)
                for name, x in _read(files, stored, config, names):
                    slot.put(x, names[name] or 0)
                    bar.update()
                value = slot.value
                del slot  # so that only the caller refers to the parameter
                yield weight.path, value
                del value

    return config, dtype, parameters()


def _read(
    files: HFDirectory, stored: Stored, config: ModelConfig, names: Collection[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the InternLM2 tensors of these names, in the order of the files.

    Of Llama's q, k and v, those that are read first wait in memory for the others.
    """
    whole = {part: name for name in names for part in stored[name]}
    waiting: dict[str, np.ndarray] = {}
    for part, x in files.read(whole):
        waiting[part] = x
        del x
        name = whole[part]
        if all(part in waiting for part in stored[name]):
            yield name, llama.join([waiting.pop(part) for part in stored[name]], config)


def _check_tensors(files: HFDirectory, config: ModelConfig) -> Stored:
    """Check names and shapes of all tensors; one error names all problems."""
    layout = llama.layout_of(files.path)
    stored = {
        name: llama.shapes(name, weight.hf_shape(config), config, layout)
        for name, weight, _ in hf_tensors(config)
    }
    expected = {name: shape for shapes in stored.values() for name, shape in shapes.items()}
    found = {n: s for n, s in files.shapes.items() if not is_known_extra(n, config)}
    problems = {
        "missing": [f"{n} {list(s)}" for n, s in expected.items() if n not in found],
        "unknown": [f"{n} {list(s)}" for n, s in found.items() if n not in expected],
        "of another shape": [
            f"{n} {list(found[n])} instead of {list(s)}"
            for n, s in expected.items()
            if n in found and found[n] != s
        ],
    }
    if any(problems.values()):
        named = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"tensors of {files.path} do not fit its config.json; {named}")
    return stored


def _some(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


class _Slot:
    """A parameter that is being filled from HF tensors."""

    def __init__(self, model: InternLM2, weight: Weight, mesh: Mesh | None):
        owner, name = find_param(model, weight.path)
        param = getattr(owner, name)
        axes = param.get_metadata()["axes"]
        # Merged axes are split by the first of them, the outermost, which alone is ever sharded.
        logical = dict(zip(weight.axes, axes, strict=True))
        like = param.get_value()
        self._sharding: Any = default_device()
        if mesh is not None:
            # A tensor that is to be quantized is whole on every device until it is small.
            outer = [logical[dim[0]] for dim in weight.hf_axes.split(",")]
            split = (None,) * len(outer) if is_quantized(like) else outer
            self._sharding = NamedSharding(mesh, sharding.spec(split, mesh))
        self._place = _placer(weight, logical, model.config, like)
        self.value: Any = None
        if weight.stacked:
            self.value = jax.jit(
                lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like),
                out_shardings=jax.tree.map(lambda s: s.sharding, like),
            )()

    def put(self, x: np.ndarray, layer: int) -> None:
        """Write one layer, or the whole of a parameter that is not stacked."""
        # In the stored dtype, and already split like its parameter.
        on_device = jax.device_put(x, self._sharding)
        # Waiting limits the tensors in flight, and so the host memory, to one.
        self.value = jax.block_until_ready(self._place(self.value, on_device, jnp.int32(layer)))


def _placer(weight: Weight, logical: Mapping[str, str | None], config: ModelConfig, like: Any):
    """Return a jitted (parameter, HF tensor, layer) -> parameter with the layer set, in place.

    A parameter that is not stacked is None before.
    """

    def place(value, x, layer):
        with sharding.mesh_of(x):
            if is_quantized(like):
                x = quantize_like(like, weight.from_hf(x, config))
                axes = like.axes_of(tuple(logical[a] for a in weight.axes))
                x = jax.tree.map(lambda x, a: sharding.constrain(x, *a), x, axes)
            else:
                flat = [logical[a] for a in weight.hf_axes.replace(",", "")]
                out = sharding.current_spec(flat)
                x = weight.from_hf(x, config, out_sharding=out).astype(like.dtype)
            if not weight.stacked:
                return x

            update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
            return jax.tree.map(update, value, x)

    return jax.jit(place, donate_argnums=0)
