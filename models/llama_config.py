"""config.json of LlamaForCausalLM, translated to InternLM2's: the architectures are the same.

An InternLM2 whose wqkv was split into q, k and v is published as a Llama. A Llama that computes
something else is refused.

References:
  transformers 5, models/llama/configuration_llama.py (keys and defaults).
"""

from collections.abc import Mapping
from typing import Any

# Defaults of Llama that are not those of InternLM2, and those of the keys that are read here.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "pad_token_id": None,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
}


def from_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of InternLM2's config.json for those of a Llama.

    Raises:
      ValueError: the feed-forward layers have biases, or heads have another width than hidden_size
        / num_attention_heads. Rotary scaling and activation are checked with InternLM2's.
    """
    value = {**_DEFAULTS, **hf, "model_type": "internlm2"}
    if value["mlp_bias"]:
        raise ValueError(
            f"mlp_bias={value['mlp_bias']!r:.40} in config.json: InternLM2's feed-forward layers "
            "have no biases, so this Llama is no InternLM2"
        )
    head_dim, sizes = value["head_dim"], (value["hidden_size"], value["num_attention_heads"])
    whole = all(type(size) is int and size > 0 for size in sizes)
    if head_dim is not None and whole and head_dim * sizes[1] != sizes[0]:
        raise ValueError(
            f"head_dim={head_dim!r:.40} in config.json must be hidden_size / num_attention_heads = "
            f"{sizes[0]} / {sizes[1]}, as in InternLM2"
        )
    # One key for the biases of all four projections, as in InternLM2.
    return value | {"bias": value["attention_bias"]}
