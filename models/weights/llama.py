"""InternLM2's weights and config as a Llama model has them, for tools that know only Llama.

The architectures are the same: wqkv un-fused is q, k and v, and the rest has other names. The
heads' rotary halves are ordered alike, so no row moves inside of a head.

N query heads, K kv heads, G = N / K, H head dim, D embed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from models.config import ModelConfig

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


def shapes(name: str, shape: tuple[int, ...], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Llama's tensors, names and shapes, of one of InternLM2's.

    Args:
      name: HF name of the tensor in InternLM2.
      shape: its shape.
      config: the architecture.
    """
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


def tensors(name: str, x: np.ndarray, config: ModelConfig) -> Iterator[np.ndarray]:
    """The tensors that `shapes` names, in its order."""
    if "attention.wqkv" not in name:
        yield x
        return
    K, G, H = config.num_kv_heads, config.group_size, config.head_dim
    split = x.reshape(K, G + 2, H, *x.shape[1:])
    for part in (split[:, :G], split[:, G], split[:, G + 1]):
        yield part.reshape(-1, *x.shape[1:])


def hf_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Contents of a config.json for LlamaForCausalLM, as `ModelConfig.to_hf` for InternLM2."""
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
