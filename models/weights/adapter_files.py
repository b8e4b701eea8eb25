"""PEFT directories: a LoRA adapter as adapter_config.json and adapter_model.safetensors.

PEFT stores A as [R, in] and B as [out, R] for each linear layer, under the layer's HF name. With
layout "llama" the adapter of the fused wqkv becomes three: q, k and v share A, and the rows of B
are divided as the rows of the weight are.

L layers, R rank.

References:
  peft 0.21: utils/save_and_load.py (names), tuners/lora/config.py (keys of the config).
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.block import LINEAR
from models.config import ModelConfig
from models.files import read_json, write_json
from models.lora import TARGETS, LoRA, merged
from models.weights import llama
from models.weights.safetensors_file import SafetensorsFile, SafetensorsWriter
from models.weights.sidecar_files import new_directory
from models.weights.table import Weight, table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

AdapterParams = Mapping[str, tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]]
"""(A [L, *in, R], B [L, R, *out]) by target, float32."""


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds a PEFT adapter."""
    return (directory / CONFIG).exists()


def save_adapter(
    directory: Path,
    config: ModelConfig,
    lora: LoRA,
    params: AdapterParams,
    *,
    base: str,
    layout: str = "internlm2",
) -> None:
    """Write a PEFT directory, which appears when it is complete.

    Args:
      directory: must not exist.
      config: the architecture of the base model.
      lora: rank, scale, dropout and targets.
      params: the adapters' arrays.
      base: name or path of the base model, for base_model_name_or_path.
      layout: "internlm2", or "llama" for a base model in Llama's layout.

    Raises:
      FileExistsError: the directory exists.
      OSError: the disk is full, or a file cannot be written.
    """
    with new_directory(directory) as partial:
        write_adapter(partial, config, lora, params, base=base, layout=layout)


def write_adapter(
    directory: Path,
    config: ModelConfig,
    lora: LoRA,
    params: AdapterParams,
    *,
    base: str,
    layout: str,
    dtype: str = "float32",
) -> None:
    """Write the files of `save_adapter` into an existing directory, in a dtype.

    Raises:
      OSError: the disk is full, or a file cannot be written.
      ValueError: a value overflows in the dtype.
    """
    tensors = dict(_tensors(config, lora, params, layout))
    shapes = {name: x.shape for name, x in tensors.items()}
    write_json(directory / CONFIG, _peft_config(config, lora, base, layout))
    with SafetensorsWriter(directory / WEIGHTS, shapes, dtype) as file:
        for name, x in tensors.items():
            stored = x.astype(dtype)
            if not np.isfinite(stored).all() and np.isfinite(x).all():
                raise ValueError(
                    f"{name}: a value overflows in {dtype} (largest {np.abs(x).max():g}): take "
                    "bfloat16 or float32"
                )
            file.put(name, stored)


def load_adapter(directory: Path, config: ModelConfig) -> tuple[LoRA, AdapterParams]:
    """Read a PEFT directory in InternLM2's or Llama's layout.

    Args:
      directory: holds adapter_config.json and adapter_model.safetensors.
      config: the architecture of the base model.

    Returns:
      The description of the adapters, and their arrays.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged; the adapter is not plain LoRA; or it belongs to another base
        model: all tensors that differ are named.
    """
    fields = read_json(directory / CONFIG)
    _check_plain(directory / CONFIG, fields)
    if not (directory / WEIGHTS).exists():
        raise FileNotFoundError(f"{directory / WEIGHTS} is missing")
    with SafetensorsFile(directory / WEIGHTS) as file:
        found = {name: file.tensor(name).astype(np.float32) for name in file.shapes}
    layout = "llama" if any(".self_attn." in name or ".mlp." in name for name in found) else None
    layout = layout or "internlm2"
    targets = tuple(
        t for t in TARGETS if any(f".{n}." in name for name in found for n in _names(t))
    )
    try:
        lora = LoRA(
            rank=int(fields["r"]),
            alpha=float(fields["lora_alpha"]),
            dropout=float(fields.get("lora_dropout") or 0.0),
            targets=targets,
            rslora=bool(fields.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory / CONFIG} does not describe a LoRA adapter: {error}"
        ) from None
    _check_shapes(directory, config, lora, layout, found)
    return lora, {t: _joined(directory, config, lora, layout, found, t) for t in targets}


def merge_parameters(
    parameters: Iterable[tuple[str, jax.Array]], lora: LoRA, params: AdapterParams
) -> Iterator[tuple[str, jax.Array]]:
    """Add adapters to the parameters of their base model, one parameter after the other.

    Args:
      parameters: (path, parameter), from `models.weights.load.hf_parameters`.
      lora: for the scale.
      params: the adapters' arrays.

    Yields:
      (path, parameter in its own dtype): W + scale * A B, computed in float32 and rounded once.
    """
    targets = {f"blocks.{module}.{name}": t for t, (module, name, _) in LINEAR.items()}
    for path, w_L in parameters:
        target = targets.get(path, "")
        if target in params:
            a_L, b_L = (jnp.asarray(x) for x in params[target])
            w_L = jax.lax.map(lambda x: merged(x[0], x[1], x[2], lora), (w_L, a_L, b_L))
        yield path, w_L
        del w_L  # before the next one is made


def _tensors(
    config: ModelConfig, lora: LoRA, params: AdapterParams, layout: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of the file with their names, layer by layer."""
    for i in range(config.num_layers):
        for target in lora.targets:
            a, b = (np.asarray(x[i], np.float32) for x in params[target])
            a_hf = a.reshape(-1, lora.rank).T
            b_hf = b.reshape(lora.rank, -1).T
            weight = _weights(config)[target]
            for stem, rows in _parts(weight.hf.format(i=i), b_hf, config, layout):
                yield f"{stem}.lora_A.weight", a_hf
                yield f"{stem}.lora_B.weight", rows


def _parts(
    name: str, b_hf: np.ndarray, config: ModelConfig, layout: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (stem of the tensor's name, rows of B) of each HF linear layer of one of ours."""
    if layout == "internlm2":
        yield _PREFIX + name.removesuffix(".weight"), b_hf
        return
    names = llama.shapes(name, b_hf.shape, config)
    for hf_name, rows in zip(names, llama.tensors(name, b_hf, config), strict=True):
        yield _PREFIX + hf_name.removesuffix(".weight"), rows


def _joined(
    directory: Path,
    config: ModelConfig,
    lora: LoRA,
    layout: str,
    found: Mapping[str, np.ndarray],
    target: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (A, B) of a target, stacked over layers."""
    weight = _weights(config)[target]
    inputs = LINEAR[target][2]
    sizes = weight.sizes(config)
    ins, outs = sizes[:inputs], sizes[inputs:]
    places = _row_places(weight.hf.format(i=0), math.prod(outs), config, layout)
    a_L, b_L = [], []
    for i in range(config.num_layers):
        stems = [stem for stem, _ in _stems(weight, i, config, layout)]
        first = found[f"{stems[0]}.lora_A.weight"]
        for stem in stems[1:]:
            if not np.array_equal(first, found[f"{stem}.lora_A.weight"]):
                raise ValueError(
                    f"{directory}: q, k and v of layer {i} have different lora_A, and wqkv here is "
                    "one layer with one A: merge the adapter into its base with peft instead"
                )
        b_hf = np.empty((math.prod(outs), lora.rank), np.float32)
        rows = np.concatenate([found[f"{stem}.lora_B.weight"] for stem in stems])
        b_hf[places] = rows
        a_L.append(first.T.reshape(*ins, lora.rank))
        b_L.append(b_hf.T.reshape(lora.rank, *outs))
    return np.stack(a_L), np.stack(b_L)


def _row_places(name: str, rows: int, config: ModelConfig, layout: str) -> np.ndarray:
    """Return where the rows of the HF layers' B, one after the other, are in B of ours."""
    numbers = np.arange(rows)[:, None]
    return np.concatenate([part[:, 0] for _, part in _parts(name, numbers, config, layout)])


def _stems(
    weight: Weight, layer: int, config: ModelConfig, layout: str
) -> list[tuple[str, tuple[int, ...]]]:
    """Return (stem of the names, shape of the weight) of each HF linear layer of one of ours."""
    out, fan_in = weight.hf_shape(config)
    numbers = np.empty((out, 1))
    parts = _parts(weight.hf.format(i=layer), numbers, config, layout)
    return [(stem, (len(rows), fan_in)) for stem, rows in parts]


def _check_plain(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse what is not plain LoRA on the blocks' linear layers."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={fields.get('peft_type')!r} must be 'LORA'")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={fields['bias']!r} must be 'none'")
    others = (
        *("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern"),
        *("layers_to_transform", "layer_replication", "lora_bias", "target_parameters"),
    )
    if used := [key for key in others if fields.get(key)]:
        raise ValueError(f"{path} uses {', '.join(used)}, which is not supported: plain LoRA is")


def _check_shapes(
    directory: Path,
    config: ModelConfig,
    lora: LoRA,
    layout: str,
    found: Mapping[str, np.ndarray],
) -> None:
    """Check names and shapes of all tensors; one error names all that differ."""
    expected = {}
    for i in range(config.num_layers):
        for target in lora.targets:
            for stem, (out, fan_in) in _stems(_weights(config)[target], i, config, layout):
                expected[f"{stem}.lora_A.weight"] = (lora.rank, fan_in)
                expected[f"{stem}.lora_B.weight"] = (out, lora.rank)
    problems = [(n, f"{list(s)} is missing") for n, s in expected.items() if n not in found]
    problems += [(n, f"{list(x.shape)} is unknown") for n, x in found.items() if n not in expected]
    problems += [
        (n, f"is {list(found[n].shape)} instead of {list(s)}")
        for n, s in expected.items()
        if n in found and found[n].shape != s
    ]
    if problems:
        # A layer of the model is like the others: one entry for all that have the same problem.
        alike = Counter((re.sub(r"\.layers\.\d+\.", ".layers.*.", n), what) for n, what in problems)
        listed = (
            f"{name.removeprefix(_PREFIX)} {what} in {count} layer{'s' * (count > 1)}"
            for (name, what), count in alike.items()
        )
        raise ValueError(
            f"the adapter in {directory} belongs to another base model: {'; '.join(listed)}"
        )


def _peft_config(config: ModelConfig, lora: LoRA, base: str, layout: str) -> dict[str, Any]:
    modules = lora.targets
    if layout == "llama":
        modules = tuple(n for t in lora.targets for n in _names(t)[1:])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": list(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _names(target: str) -> tuple[str, ...]:
    """Return a target's name in InternLM2's layout, then its names in Llama's."""
    return {
        "wqkv": ("wqkv", "q_proj", "k_proj", "v_proj"),
        "wo": ("wo", "o_proj"),
        "w1": ("w1", "gate_proj"),
        "w3": ("w3", "up_proj"),
        "w2": ("w2", "down_proj"),
    }[target]


def _weights(config: ModelConfig) -> dict[str, Weight]:
    """Return the row of the weight table for each target."""
    rows = {row.path: row for row in table(config)}
    return {t: rows[f"blocks.{module}.{name}"] for t, (module, name, _) in LINEAR.items()}
