"""Writing of HF checkpoints, one tensor at a time: the inverse of `models.weights.load`."""

import contextlib
import functools
import itertools
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models import sharding
from models.config import ModelConfig
from models.files import write_json
from models.internlm2 import InternLM2
from models.weights import llama, sidecar_files
from models.weights.abstract import named_params
from models.weights.hf_files import INDEX, SINGLE
from models.weights.safetensors_file import DTYPES, SafetensorsWriter, nbytes
from models.weights.table import Weight, hf_tensors, table

LAYOUTS = ("internlm2", "llama")
MAX_SHARD_BYTES = 5_000_000_000

Shapes = dict[str, tuple[int, ...]]


def save_hf(
    model: InternLM2,
    directory: str | Path,
    *,
    assets_from: str | Path | None = None,
    layout: str = "internlm2",
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write a HF directory that transformers, vLLM and LMDeploy load.

    The directory contains config.json, generation_config.json, and model.safetensors or shards with
    an index. A model that is loaded and saved in one dtype has the same bytes in every tensor.

    Args:
      model: a model on any devices.
      directory: destination; must not exist, and appears when it is complete.
      assets_from: directory whose tokenizer, code and other files are copied: the checkpoint that
        the model was fine-tuned from. Other tools load InternLM2 only with this code.
      layout: "internlm2", or "llama": wqkv split and names of LlamaForCausalLM, without code.
      dtype: dtype to store: "float32", "bfloat16" or "float16"; None: the model's param_dtype.
      max_shard_bytes: largest file, unless one tensor is larger.
      progress: show a progress bar.

    Raises:
      FileExistsError: the destination exists.
      FileNotFoundError: assets_from does not exist.
      ValueError: layout or dtype is unknown, a weight overflows in dtype, the tokenizer in
        assets_from cannot be read, or an eos id is outside of the vocabulary.
      OSError: a file cannot be written, for example because the disk is full.

    Memory: on the host one tensor; on a device one tensor more than the model.
    """
    write_hf(
        model.config,
        named_params(model).items(),
        directory,
        dtype=str(jnp.dtype(model.embed_VD.dtype if dtype is None else dtype)),
        assets_from=assets_from,
        layout=layout,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


def write_hf(
    config: ModelConfig,
    parameters: Iterable[tuple[str, jax.Array]],
    directory: str | Path,
    *,
    dtype: str,
    assets_from: str | Path | None = None,
    layout: str = "internlm2",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write a HF directory from an iterator of parameters, which need not all be in memory.

    `parameters` yields (path, array) of every parameter, in any order; no reference to an array is
    kept. Other arguments and errors as for `save_hf`.
    """
    assets_from = _check(layout, dtype, max_shard_bytes, assets_from)
    shards = _shards(config, layout, dtype, max_shard_bytes)
    with sidecar_files.new_directory(Path(directory)) as partial, contextlib.ExitStack() as files:
        _write_sidecar_files(assets_from, partial, config, layout, dtype)
        _write_index(partial, shards, dtype)
        file_of: dict[str, SafetensorsWriter] = {}
        for name, shard in shards.items():
            file = files.enter_context(SafetensorsWriter(partial / name, shard, dtype))
            file_of |= dict.fromkeys(shard, file)
        tensors = _tensors(config, parameters, layout, dtype, file_of)
        # The first tensor is read before the bar is shown, so that an error comes first.
        tensors = itertools.chain([next(tensors)], tensors)
        for name, x in tqdm(tensors, "writing", len(file_of), unit="tensor", disable=not progress):
            file_of[name].put(name, x)


def snapshot_hf(
    model: InternLM2,
    *,
    dtype: str,
    layout: str = "internlm2",
    assets_from: Path | None = None,
    part: int = 0,
    parts: int = 1,
) -> Callable[[Path], None]:
    """Copy the weights to host memory, and return a function that writes them as a HF directory.

    The function uses no device, so that a thread can call it while training goes on. Several
    processes share the work: all call this function, each keeps the tensors of its own files, and
    the files of all together are the HF directory. This process is number `part` of `parts`; other
    arguments are as for `save_hf`.

    Returns:
      A function of an existing directory, to be called once.

    Raises:
      ValueError, FileNotFoundError: as for `save_hf`; on all processes.

    Memory: on the host the weights in dtype, divided by parts; on each device one tensor.
    """
    assets_from = _check(layout, dtype, MAX_SHARD_BYTES, assets_from)
    config = model.config
    total = sum(nbytes(shape, dtype) for shape in _shapes(config, layout).values())
    shards = _shards(config, layout, dtype, min(MAX_SHARD_BYTES, -(-total // parts)))
    own = dict(itertools.islice(shards.items(), part, None, parts))
    wanted = {name for shard in own.values() for name in shard}
    found = dict(_tensors(config, named_params(model).items(), layout, dtype, wanted))

    def write(directory: Path) -> None:
        # Its own part: other processes may have written theirs already.
        _check_space(directory, sum(x.nbytes for x in found.values()))
        if part == 0:
            _write_sidecar_files(assets_from, directory, config, layout, dtype)
            _write_index(directory, shards, dtype)
        for name, shard in own.items():
            with SafetensorsWriter(directory / name, shard, dtype) as file:
                for tensor in shard:
                    file.put(tensor, found.pop(tensor))

    return write


def _check(
    layout: str, dtype: str, max_shard_bytes: int, assets_from: str | Path | None
) -> Path | None:
    """Check the arguments of a save; return assets_from as a path."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES.values())}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    if assets_from is not None and not Path(assets_from).is_dir():
        raise FileNotFoundError(f"{assets_from} is not a directory")
    return None if assets_from is None else Path(assets_from)


def _check_space(directory: Path, need: int) -> None:
    """Find a full disk before the first byte is written."""
    if (free := shutil.disk_usage(directory).free) < need:
        raise OSError(
            f"No space left on device: the weights need {need:,} bytes, {directory} has {free:,}"
        )


def _shapes(config: ModelConfig, layout: str) -> Shapes:
    """Return the shape of every tensor by name, in the order of a forward pass."""
    shapes: Shapes = {}
    for name, weight, _ in _by_layer(config):
        shapes |= llama.shapes(name, weight.hf_shape(config), config, layout)
    return shapes


def _shards(config: ModelConfig, layout: str, dtype: str, limit: int) -> dict[str, Shapes]:
    """Assign tensors to files up to the limit; return the tensors of each file by its name."""
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in _shapes(config, layout).items():
        bytes_ = nbytes(shape, dtype)
        if shards[-1] and filled + bytes_ > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += bytes_
    n = len(shards)
    if n == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{n:05}.safetensors": s for i, s in enumerate(shards, start=1)}


def _write_index(directory: Path, shards: Mapping[str, Shapes], dtype: str) -> None:
    """Write the index of several files; a single file has none."""
    if len(shards) > 1:
        total = sum(nbytes(shape, dtype) for shard in shards.values() for shape in shard.values())
        weight_map = {name: file for file, shard in shards.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX, index)


def _tensors(
    config: ModelConfig,
    parameters: Iterable[tuple[str, jax.Array]],
    layout: str,
    dtype: str,
    wanted: Collection[str],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, tensor) for the wanted tensors of the checkpoint.

    All processes that hold a parameter compute all of its tensors together.

    Raises:
      ValueError: a finite weight becomes infinite in dtype.
    """
    rows = {weight.path: weight for weight in table(config)}
    for path, value in parameters:
        weight = rows.pop(path)
        for i in range(config.num_layers) if weight.stacked else (0,):
            name, shape = weight.hf.format(i=i), weight.hf_shape(config)
            whole = not value.is_fully_addressable
            x, overflows, largest = _layer(value, jnp.int32(i), weight, dtype, whole)
            if overflows:
                raise ValueError(
                    f"{name}: {int(overflows)} of {x.size} values overflow in {dtype} (largest "
                    f"{float(largest):.6g}, limit {float(jnp.finfo(dtype).max):.6g}): take "
                    "bfloat16 or float32"
                )
            names = llama.shapes(name, shape, config, layout)
            if not any(n in wanted for n in names):
                continue
            x = np.asarray(x).reshape(shape)
            parts = llama.tensors(name, x, config, layout)
            yield from ((n, part) for n, part in zip(names, parts, strict=True) if n in wanted)
        del value  # before the next one is made
    assert not rows, f"no parameter {', '.join(rows)}"


@functools.partial(jax.jit, static_argnames=("weight", "dtype", "whole"))
def _layer(
    value: jax.Array, layer: jax.Array, weight: Weight, dtype: str, whole: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return one layer of a parameter, its overflows in dtype, and its largest finite value.

    The axes are in the order of HF and not merged: merging axes that are split over devices would
    move data, so the host does it. `whole` gathers the layer on every device, because a process
    reads only its own devices. The layer never shares memory with the parameter.
    """
    with sharding.mesh_of(value):
        if weight.stacked:
            value = jax.lax.dynamic_index_in_dim(value, layer, 0, keepdims=False)
        finite, x = jnp.isfinite(value), value.astype(dtype)
        overflows = (finite & jnp.isinf(x)).sum()
        x = jnp.copy(x.transpose(weight.order))
        if whole:
            x = sharding.constrain(x, *(None,) * x.ndim)
        return x, overflows, jnp.abs(value).max(where=finite, initial=0)


def _by_layer(config: ModelConfig) -> list[tuple[str, Weight, int | None]]:
    """Return all tensors in the order in which a forward pass uses them."""

    def key(entry):
        _, weight, i = entry
        is_last = not weight.stacked and weight.path != "embed_VD"
        return (is_last, -1 if i is None else i)

    return sorted(hf_tensors(config), key=key)


def _write_sidecar_files(
    source: Path | None, directory: Path, config: ModelConfig, layout: str, dtype: str
) -> None:
    """Write all files other than the weights."""
    hf = sidecar_files.sidecar_config(source, config, dtype=dtype, layout=layout)
    # Files of Llama's layout are for tools without InternLM2's own code.
    convert = layout == "llama" and source is not None and llama.layout_of(source) != "llama"
    copy = sidecar_files.copy_for_llama if convert else sidecar_files.copy_sidecar_files
    if source is not None:
        copy(source, directory)
    write_json(directory / sidecar_files.CONFIG, hf)
    generation = sidecar_files.generation_config(source, config)
    write_json(directory / sidecar_files.GENERATION, generation)
