"""A model as a HF checkpoint, tensor by tensor: the inverse of `load_hf`."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from models import companions, llama, safetensors_file, sharding
from models.config import ModelConfig
from models.hf_files import INDEX, SINGLE
from models.internlm2 import InternLM2
from models.weights import Weight, hf_tensors, resolve, table

LAYOUTS = ("internlm2", "llama")
MAX_SHARD_BYTES = 5_000_000_000

Shapes = dict[str, tuple[int, ...]]


def save_hf(
    model: InternLM2,
    directory: str | Path,
    *,
    beside: str | Path | None = None,
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
      beside: directory whose tokenizer, code and other files go along: the checkpoint that the
        model comes from. These tools know InternLM2 only by the code that lies beside its weights.
      layout: "internlm2", or "llama": wqkv un-fused and named for LlamaForCausalLM, no code.
      dtype: type to store: "float32", "bfloat16" or "float16"; None: as the model stores it.
      max_shard_bytes: a file holds no more, unless one tensor does.
      progress: show a progress bar.

    Raises:
      FileExistsError: the destination exists.
      FileNotFoundError: beside does not exist.
      ValueError: an unknown layout or dtype, or a tokenizer beside it that cannot be read.
      OSError: the disk is full, or refuses.

    Memory: on the host one tensor; on a device one more than the model.
    """
    dtype = str(jnp.dtype(model.embed_VD.dtype if dtype is None else dtype))
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(LAYOUTS)}")
    if dtype not in safetensors_file.DTYPES.values():
        known = ", ".join(safetensors_file.DTYPES.values())
        raise ValueError(f"dtype={dtype!r} must be one of {known}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    config, beside = model.config, None if beside is None else Path(beside)
    if beside is not None and not beside.is_dir():
        raise FileNotFoundError(f"{beside} is not a directory")
    shapes: Shapes = {}
    for name, weight, _ in _by_layer(config):
        shape = weight.hf_shape(config)
        shapes |= llama.shapes(name, shape, config) if layout == "llama" else {name: shape}
    with companions.new_directory(Path(directory)) as partial:
        _write_beside(beside, partial, config, layout, dtype)
        tensors = _tensors(model, layout, dtype)
        bar = tqdm(tensors, "writing", len(shapes), unit="tensor", disable=not progress)
        _write(partial, shapes, dtype, iter(bar), max_shard_bytes)


def _write(
    directory: Path, shapes: Shapes, dtype: str, tensors: Iterator[np.ndarray], limit: int
) -> None:
    """The files, each as full as the limit allows, and their index where there are several."""
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = safetensors_file.size(shape, dtype)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    files = [SINGLE]
    if len(shards) > 1:
        n = len(shards)
        files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        total = sum(safetensors_file.size(shape, dtype) for shape in shapes.values())
        weight_map = {n: f for f, shard in zip(files, shards, strict=True) for n in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        companions.write_json(directory / INDEX, index)
    for file, shard in zip(files, shards, strict=True):
        part = itertools.islice(tensors, len(shard))
        safetensors_file.write(directory / file, shard, dtype, part)


def _tensors(model: InternLM2, layout: str, dtype: str) -> Iterator[np.ndarray]:
    """Every tensor of the checkpoint, made when it is asked for."""
    config = model.config
    fetch = {weight.path: _fetcher(model, weight, dtype) for weight in table(config)}
    for name, weight, i in _by_layer(config):
        x = fetch[weight.path](0 if i is None else i).reshape(weight.hf_shape(config))
        if layout == "llama":
            yield from llama.tensors(name, x, config)
        else:
            yield x


def _fetcher(model: InternLM2, weight: Weight, dtype: str):
    """Layer -> the parameter on the host, its axes in HF's order, not merged yet."""
    owner, name = resolve(model, weight.path)
    value = getattr(owner, name).get_value()

    @jax.jit
    def one(value, layer):
        with sharding.mesh_of(value):
            if weight.stacked:
                value = jax.lax.dynamic_index_in_dim(value, layer, 0, keepdims=False)
            # Merging axes is left to the host: where they are split over devices, it would move.
            return value.transpose(weight.order).astype(dtype)

    return lambda layer: np.asarray(one(value, jnp.int32(layer)))


def _by_layer(config: ModelConfig) -> list[tuple[str, Weight, int | None]]:
    """All tensors in the order in which a forward pass meets them."""

    def key(entry):
        _, weight, i = entry
        is_last = not weight.stacked and weight.path != "embed_VD"
        return (is_last, -1 if i is None else i)

    return sorted(hf_tensors(config), key=key)


def _write_beside(
    source: Path | None, directory: Path, config: ModelConfig, layout: str, dtype: str
) -> None:
    """Everything but the weights."""
    if layout == "llama":
        hf = llama.hf_config(config, dtype=dtype)
        copy = companions.copy_for_llama
    else:
        hf = companions.config_beside(source, config, dtype=dtype)
        copy = companions.copy_beside
    if source is not None:
        copy(source, directory)
    companions.write_json(directory / companions.CONFIG, hf)
    companions.write_generation_config(source, directory, config)
