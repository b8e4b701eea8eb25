"""Writing of HF checkpoints, one tensor at a time: the inverse of `models.weights.load`."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
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

    Raises the same errors as `save_hf`.

    Args:
      config: the architecture.
      parameters: (path, array) of every parameter, in any order; no reference to an array is kept.
      directory: as for `save_hf`.
      dtype: dtype to store.
      assets_from: as for `save_hf`.
      layout: as for `save_hf`.
      max_shard_bytes: as for `save_hf`.
      progress: show a progress bar.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES.values())}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    assets_from = None if assets_from is None else Path(assets_from)
    if assets_from is not None and not assets_from.is_dir():
        raise FileNotFoundError(f"{assets_from} is not a directory")
    shapes: Shapes = {}
    for name, weight, _ in _by_layer(config):
        shape = weight.hf_shape(config)
        shapes |= llama.shapes(name, shape, config) if layout == "llama" else {name: shape}
    with sidecar_files.new_directory(Path(directory)) as partial, contextlib.ExitStack() as files:
        _write_sidecar_files(assets_from, partial, config, layout, dtype)
        file_of: dict[str, SafetensorsWriter] = {}
        for name, shard in _shards(partial, shapes, dtype, max_shard_bytes).items():
            file = files.enter_context(SafetensorsWriter(partial / name, shard, dtype))
            file_of |= dict.fromkeys(shard, file)
        tensors = _tensors(config, parameters, layout, dtype)
        # The first tensor is read before the bar is shown, so that an error comes first.
        tensors = itertools.chain([next(tensors)], tensors)
        for name, x in tqdm(tensors, "writing", len(shapes), unit="tensor", disable=not progress):
            file_of[name].put(name, x)


def _shards(directory: Path, shapes: Shapes, dtype: str, limit: int) -> dict[str, Shapes]:
    """Assign tensors to files up to the limit; write the index if there are several files."""
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        bytes_ = nbytes(shape, dtype)
        if shards[-1] and filled + bytes_ > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += bytes_
    if len(shards) == 1:
        return {SINGLE: shapes}
    n = len(shards)
    files = {f"model-{i:05}-of-{n:05}.safetensors": s for i, s in enumerate(shards, start=1)}
    total = sum(nbytes(shape, dtype) for shape in shapes.values())
    weight_map = {name: file for file, shard in files.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX, index)
    return files


def _tensors(
    config: ModelConfig, parameters: Iterable[tuple[str, jax.Array]], layout: str, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, tensor) for every tensor of the checkpoint.

    Raises:
      ValueError: a finite weight becomes infinite in dtype.
    """
    rows = {weight.path: weight for weight in table(config)}
    for path, value in parameters:
        weight = rows.pop(path)
        for i in range(config.num_layers) if weight.stacked else (0,):
            name, shape = weight.hf.format(i=i), weight.hf_shape(config)
            x, overflows, largest = _layer(value, jnp.int32(i), weight, dtype)
            if overflows:
                raise ValueError(
                    f"{name}: {int(overflows)} of {x.size} values overflow in {dtype} (largest "
                    f"{float(largest):.6g}, limit {float(jnp.finfo(dtype).max):.6g}): take "
                    "--dtype=bfloat16 or float32"
                )
            x = np.asarray(x).reshape(shape)
            if layout == "llama":
                names = llama.shapes(name, shape, config)
                yield from zip(names, llama.tensors(name, x, config), strict=True)
            else:
                yield name, x
        del value  # before the next one is made
    assert not rows, f"no parameter {', '.join(rows)}"


@functools.partial(jax.jit, static_argnames=("weight", "dtype"))
def _layer(
    value: jax.Array, layer: jax.Array, weight: Weight, dtype: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return one layer of a parameter, its overflows in dtype, and its largest finite value.

    The axes are in the order of HF and not merged: merging axes that are split over devices would
    move data, so the host does it.
    """
    with sharding.mesh_of(value):
        if weight.stacked:
            value = jax.lax.dynamic_index_in_dim(value, layer, 0, keepdims=False)
        finite, x = jnp.isfinite(value), value.astype(dtype)
        overflows = (finite & jnp.isinf(x)).sum()
        return x.transpose(weight.order), overflows, jnp.abs(value).max(where=finite, initial=0)


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
    if layout == "llama":
        hf = llama.hf_config(config, dtype=dtype)
        copy = sidecar_files.copy_for_llama
    else:
        hf = sidecar_files.sidecar_config(source, config, dtype=dtype)
        copy = sidecar_files.copy_sidecar_files
    if source is not None:
        copy(source, directory)
    write_json(directory / sidecar_files.CONFIG, hf)
    generation = sidecar_files.generation_config(source, config)
    write_json(directory / sidecar_files.GENERATION, generation)
