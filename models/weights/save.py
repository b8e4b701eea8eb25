"""A model as a HF checkpoint, tensor by tensor: the inverse of `models.weights.load`."""

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
from models.internlm2 import InternLM2
from models.weights import llama, sidecar_files
from models.weights.abstract import named_params
from models.weights.hf_files import INDEX, SINGLE
from models.weights.safetensors_file import DTYPES, SafetensorsWriter, size
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
    """Writes a directory that transformers, vLLM or LMDeploy load.

    It holds config.json, generation_config.json, and model.safetensors or shards with an index.
    Exact: loaded and saved in one dtype, every tensor has the bytes that it had.

    Args:
      model: on any devices.
      directory: must not exist; it appears when it is complete.
      assets_from: directory whose tokenizer, code and other files go along: the checkpoint that the
        model comes from. These tools know InternLM2 only by the code that lies beside its weights.
      layout: "internlm2", or "llama": wqkv un-fused and named for LlamaForCausalLM, no code.
      dtype: type to store: "float32", "bfloat16" or "float16"; None: as the model stores it.
      max_shard_bytes: a file holds no more, unless one tensor does.
      progress: show a progress bar.

    Raises:
      FileExistsError: the destination exists.
      FileNotFoundError: assets_from does not exist.
      ValueError: an unknown layout or dtype, or a tokenizer beside it that cannot be read.
      OSError: the disk is full, or refuses.

    Memory: on the host one tensor; on a device one more than the model.
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
    """`save_hf` of parameters that need not all exist at the same time.

    Args:
      config: the model's.
      parameters: every parameter with its path, in any order; each may be made when it is asked
        for, and is not held on to.
      directory: as for `save_hf`, like the other arguments and what is raised.
      dtype: type to store.
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
        # What cannot be read is said before a bar is shown.
        tensors = itertools.chain([next(tensors)], tensors)
        for name, x in tqdm(tensors, "writing", len(shapes), unit="tensor", disable=not progress):
            file_of[name].put(name, x)


def _shards(directory: Path, shapes: Shapes, dtype: str, limit: int) -> dict[str, Shapes]:
    """What each file holds, as full as the limit allows; writes the index of several."""
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        bytes_ = size(shape, dtype)
        if shards[-1] and filled + bytes_ > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += bytes_
    if len(shards) == 1:
        return {SINGLE: shapes}
    n = len(shards)
    files = {f"model-{i:05}-of-{n:05}.safetensors": s for i, s in enumerate(shards, start=1)}
    total = sum(size(shape, dtype) for shape in shapes.values())
    weight_map = {name: file for file, shard in files.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    sidecar_files.write_json(directory / INDEX, index)
    return files


def _tensors(
    config: ModelConfig, parameters: Iterable[tuple[str, jax.Array]], layout: str, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint with its name, made when it is asked for."""
    rows = {weight.path: weight for weight in table(config)}
    for path, value in parameters:
        weight = rows.pop(path)
        for i in range(config.num_layers) if weight.stacked else (0,):
            name, shape = weight.hf.format(i=i), weight.hf_shape(config)
            x = np.asarray(_layer(value, jnp.int32(i), weight, dtype)).reshape(shape)
            if layout == "llama":
                names = llama.shapes(name, shape, config)
                yield from zip(names, llama.tensors(name, x, config), strict=True)
            else:
                yield name, x
        del value  # before the next one is made
    assert not rows, f"no parameter {', '.join(rows)}"


@functools.partial(jax.jit, static_argnames=("weight", "dtype"))
def _layer(value: jax.Array, layer: jax.Array, weight: Weight, dtype: str) -> jax.Array:
    """One layer of a parameter, its axes in HF's order, not merged yet."""
    with sharding.mesh_of(value):
        if weight.stacked:
            value = jax.lax.dynamic_index_in_dim(value, layer, 0, keepdims=False)
        # Merging axes is left to the host: where they are split over devices, it would move.
        return value.transpose(weight.order).astype(dtype)


def _by_layer(config: ModelConfig) -> list[tuple[str, Weight, int | None]]:
    """All tensors in the order in which a forward pass meets them."""

    def key(entry):
        _, weight, i = entry
        is_last = not weight.stacked and weight.path != "embed_VD"
        return (is_last, -1 if i is None else i)

    return sorted(hf_tensors(config), key=key)


def _write_sidecar_files(
    source: Path | None, directory: Path, config: ModelConfig, layout: str, dtype: str
) -> None:
    """Everything but the weights."""
    if layout == "llama":
        hf = llama.hf_config(config, dtype=dtype)
        copy = sidecar_files.copy_for_llama
    else:
        hf = sidecar_files.sidecar_config(source, config, dtype=dtype)
        copy = sidecar_files.copy_sidecar_files
    if source is not None:
        copy(source, directory)
    sidecar_files.write_json(directory / sidecar_files.CONFIG, hf)
    sidecar_files.write_generation_config(source, directory, config)
