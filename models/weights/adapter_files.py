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

    `config` and `base`, its name or path, are those of the base model; `layout` is "internlm2", or
    "llama" for a base model in Llama's layout.

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
      OSError, ValueError: as for `save_adapter`; or a value overflows in the dtype.
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
    """Read the adapters in a PEFT directory in InternLM2's or Llama's layout.

    `config` is the architecture of the base model.

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
        t
        for t in TARGETS
        if any(f".{n}." in name for name in found for n in _modules(config, layout, t))
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
            b_hf = b.reshape(lora.rank, -1).T
            for stem, rows in _hf_layers(config, layout, target, i).items():
                yield f"{stem}.lora_A.weight", a.reshape(-1, lora.rank).T
                yield f"{stem}.lora_B.weight", b_hf[rows]


def _hf_layers(config: ModelConfig, layout: str, target: str, layer: int) -> dict[str, np.ndarray]:
    """Return the HF linear layers that a target is stored as, by the stem of their tensors.

    The values are the rows that a layer has of the InternLM2 weight, as HF stores it.
    """
    weight = _weight(config, target)
    name, rows = weight.hf.format(i=layer), np.arange(weight.hf_shape(config)[0])
    names = llama.shapes(name, rows.shape, config, layout)
    parts = llama.tensors(name, rows, config, layout)
    stems = (_PREFIX + name.removesuffix(".weight") for name in names)
    return dict(zip(stems, parts, strict=True))


def _joined(
    directory: Path,
    config: ModelConfig,
    lora: LoRA,
    layout: str,
    found: Mapping[str, np.ndarray],
    target: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (A, B) of a target, stacked over layers."""
    inputs, sizes = LINEAR[target][2], _weight(config, target).sizes(config)
    ins, outs = sizes[:inputs], sizes[inputs:]
    a_L, b_L = [], []
    for i in range(config.num_layers):
        layers = _hf_layers(config, layout, target, i)
        first, *others = (found[f"{stem}.lora_A.weight"] for stem in layers)
        if not all(np.array_equal(first, other) for other in others):
            raise ValueError(
                f"{directory}: q, k and v of layer {i} have different lora_A, and wqkv here is "
                "one layer with one A: merge the adapter into its base with peft instead"
            )
        b_hf = np.empty((math.prod(outs), lora.rank), np.float32)
        for stem, rows in layers.items():
            b_hf[rows] = found[f"{stem}.lora_B.weight"]
        a_L.append(first.T.reshape(*ins, lora.rank))
        b_L.append(b_hf.T.reshape(lora.rank, *outs))
    return np.stack(a_L), np.stack(b_L)


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
            fan_in = _weight(config, target).hf_shape(config)[1]
            for stem, rows in _hf_layers(config, layout, target, i).items():
                expected[f"{stem}.lora_A.weight"] = (lora.rank, fan_in)
                expected[f"{stem}.lora_B.weight"] = (len(rows), lora.rank)
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
    modules = [name for t in lora.targets for name in _modules(config, layout, t)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _modules(config: ModelConfig, layout: str, target: str) -> list[str]:
    """Return the names of the HF linear layers that a target is stored as, without their block."""
    return [stem.rpartition(".")[2] for stem in _hf_layers(config, layout, target, 0)]


def _weight(config: ModelConfig, target: str) -> Weight:
    """Return the row of the weight table for a target."""
    module, name, _ = LINEAR[target]
    return next(row for row in table(config) if row.path == f"blocks.{module}.{name}")
