"""Weights and config of InternLM2 in the layout of Llama, which more tools support.

The architectures are the same: wqkv is split into q, k and v, and the other tensors are renamed.
The rotary halves of a head are in the same order, so no row moves within a head.

N query heads, K kv heads, G = N / K, H head dim, D embed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.config import ModelConfig
from models.files import read_json
from models.weights import run_layout

_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output": "lm_head",
}


def layout_of(*directories: Path | None) -> str:
    """Return the layout of weights, "llama" or "internlm2", by the first directory that has one.

    Args:
      directories: directories of weights; runs or checkpoints of a run, which record the layout of
        their exports; None is skipped.

    Returns:
      "internlm2" where no directory has a layout.
    """
    return next(filter(None, map(_layout_in, directories)), "internlm2")


def _layout_in(directory: Path | None) -> str | None:
    if directory is None:
        return None
    if checkpoint := run_layout.find_checkpoint(directory):
        flags = read_json(checkpoint / run_layout.RUN / run_layout.METADATA).get("config")
        return flags.get("export_layout") if isinstance(flags, dict) else None
    config = directory / "config.json"
    if not config.exists():
        return None
    return "llama" if read_json(config).get("model_type") == "llama" else "internlm2"


def shapes(
    name: str, shape: tuple[int, ...], config: ModelConfig, layout: str = "llama"
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that one InternLM2 tensor becomes in a layout.

    Args:
      name: HF name of the InternLM2 tensor.
      shape: shape of the InternLM2 tensor.
      config: the architecture.
      layout: "llama", or "internlm2": the tensor itself.
    """
    if layout == "internlm2":
        return {name: shape}
    if "attention.wqkv" not in name:
        stem, _, kind = name.rpartition(".")
        for ours, theirs in _NAMES.items():
            if stem == ours or stem.endswith("." + ours):
                stem = stem.removesuffix(ours) + theirs
        return {f"{stem}.{kind}": shape}
    H, rest = config.head_dim, shape[1:]
    rows = {"q": config.num_heads * H, "k": config.num_kv_heads * H, "v": config.num_kv_heads * H}
    return {
        name.replace("attention.wqkv", f"self_attn.{part}_proj"): (n, *rest)
        for part, n in rows.items()
    }


def tensors(
    name: str, x: np.ndarray, config: ModelConfig, layout: str = "llama"
) -> Iterator[np.ndarray]:
    """Yield the tensors of one InternLM2 tensor in a layout, in the order of `shapes`."""
    if layout == "internlm2" or "attention.wqkv" not in name:
        yield x
        return
    K, G, H = config.num_kv_heads, config.group_size, config.head_dim
    split = x.reshape(K, G + 2, H, *x.shape[1:])
    for part in (split[:, :G], split[:, G], split[:, G + 1]):
        yield part.reshape(-1, *x.shape[1:])


def join(parts: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
    """Return the InternLM2 tensor of the tensors of `shapes`: the inverse of `tensors`."""
    if len(parts) == 1:
        return parts[0]
    K, H = config.num_kv_heads, config.head_dim
    split = [part.reshape(K, -1, H, *part.shape[1:]) for part in parts]
    return np.concatenate(split, axis=1).reshape(-1, *parts[0].shape[1:])


def hf_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Return the contents of a config.json for LlamaForCausalLM, see `ModelConfig.to_hf`."""
    hf = config.to_hf(dtype=dtype)
    del hf["auto_map"], hf["attn_implementation"]
    # One key for the biases of all four projections, as in InternLM2.
    hf["attention_bias"] = hf.pop("bias")
    return hf | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": config.head_dim,
        "mlp_bias": False,
    }
