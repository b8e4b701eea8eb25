"""Table of HF tensors and the model's parameters; conversions in both directions use it.

The name of a parameter ends in its axes (wqkv_DKgH). HF stores the same axes in another order, some
of them merged into one. Shapes, conversion and its inverse follow from the axes in the table.

D embed, F ffn, H head dim, K kv heads, N query heads, V vocab, g = N / K + 2: for each kv head its
query heads, then k, then v.
"""

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One row of the table.

    Attributes:
      hf: name of the tensor in a HF checkpoint; {i} is the layer.
      path: attribute path of the parameter in `InternLM2`; parameters of blocks are stacked.
      hf_axes: axes of the HF tensor: "KgH,D" is a matrix of K * g * H rows and D columns.
    """

    hf: str
    path: str
    hf_axes: str

    @property
    def axes(self) -> str:
        """Return the axes of the parameter (of one layer): the ending of its name."""
        return self.path.rpartition("_")[2]

    @property
    def stacked(self) -> bool:
        """Return True if the parameter has a leading axis over layers."""
        return "{i}" in self.hf

    @property
    def order(self) -> tuple[int, ...]:
        """Return the axes of the parameter (of one layer) in the order of HF."""
        return tuple(self.axes.index(a) for a in self.hf_axes.replace(",", ""))

    def sizes(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the shape of the parameter (of one layer)."""
        sizes = _sizes(config)
        return tuple(sizes[a] for a in self.axes)

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the shape of the HF tensor."""
        sizes = _sizes(config)
        return tuple(math.prod(sizes[a] for a in dim) for dim in self.hf_axes.split(","))

    def from_hf(self, x: jax.Array, config: ModelConfig, **kwargs) -> jax.Array:
        """Convert a HF tensor to the parameter (of one layer): split axes, reorder them.

        `kwargs` are arguments of reshape: out_sharding, in the order of hf_axes.
        """
        sizes, flat = _sizes(config), self.hf_axes.replace(",", "")
        split = x.reshape(tuple(sizes[a] for a in flat), **kwargs)
        return split.transpose([flat.index(a) for a in self.axes])

    def to_hf(self, x: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Convert a parameter (of one layer) to the HF tensor: the inverse of `from_hf`."""
        return x.transpose(self.order).reshape(self.hf_shape(config))


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """Return the rows of the parameters that a model of this configuration has."""
    rows = (*_ALWAYS, *(_BIAS if config.bias else ()))
    return rows if config.tie_word_embeddings else (*rows, _OUTPUT)


def hf_tensors(config: ModelConfig) -> Iterator[tuple[str, Weight, int | None]]:
    """Yield (name, row of the table, layer or None) for every HF tensor of a model."""
    for weight in table(config):
        for i in range(config.num_layers) if weight.stacked else (None,):
            yield weight.hf.format(i=i), weight, i


def find_param(model: Any, path: str) -> tuple[Any, str]:
    """Return (module, attribute name) for the path of a parameter."""
    owner, _, name = path.rpartition(".")
    return (operator.attrgetter(owner)(model) if owner else model), name


def is_known_extra(name: str, config: ModelConfig) -> bool:
    """Return True for tensors that some checkpoints contain and no model needs.

    Rotary tables are recomputed; the output matrix of a tied model is its embedding.
    """
    rotary = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
    return name.endswith(rotary) or (
        config.tie_word_embeddings and name in (_OUTPUT.hf, "lm_head.weight")
    )


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.head_dim,
        "K": config.num_kv_heads,
        "N": config.num_heads,
        "V": config.vocab_size,
        "g": config.group_size + 2,
    }


def _layer(hf: str, path: str, hf_axes: str) -> Weight:
    return Weight(hf="model.layers.{i}." + hf, path="blocks." + path, hf_axes=hf_axes)


_ALWAYS = (
    Weight(hf="model.tok_embeddings.weight", path="embed_VD", hf_axes="V,D"),
    _layer("attention_norm.weight", "attention_norm_D", "D"),
    _layer("attention.wqkv.weight", "attention.wqkv_DKgH", "KgH,D"),
    _layer("attention.wo.weight", "attention.wo_NHD", "D,NH"),
    _layer("ffn_norm.weight", "ffn_norm_D", "D"),
    _layer("feed_forward.w1.weight", "ffn.w1_DF", "F,D"),
    _layer("feed_forward.w3.weight", "ffn.w3_DF", "F,D"),
    _layer("feed_forward.w2.weight", "ffn.w2_FD", "D,F"),
    Weight(hf="model.norm.weight", path="norm_D", hf_axes="D"),
)
_BIAS = (
    _layer("attention.wqkv.bias", "attention.wqkv_bias_KgH", "KgH"),
    _layer("attention.wo.bias", "attention.wo_bias_D", "D"),
)
_OUTPUT = Weight(hf="output.weight", path="output_DV", hf_axes="V,D")
