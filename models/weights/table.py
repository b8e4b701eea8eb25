"""The one table that relates HF's tensors to the model's parameters, in both directions.

A parameter's name ends in its axes (wqkv_DKgH); HF stores the same axes in another order, some of
them merged into one. The table says which; shapes, conversion and its inverse follow from it.

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
      path: attributes that lead to the parameter in `InternLM2`; those of blocks are stacked.
      hf_axes: axes of the HF tensor: "KgH,D" is a matrix of K * g * H rows and D columns.
    """

    hf: str
    path: str
    hf_axes: str

    @property
    def axes(self) -> str:
        """Axes of the parameter (of one layer of it): the ending of its name."""
        return self.path.rpartition("_")[2]

    @property
    def stacked(self) -> bool:
        """Whether every layer has one, stacked in a leading axis of the parameter."""
        return "{i}" in self.hf

    @property
    def order(self) -> tuple[int, ...]:
        """Axes of the parameter (of one layer) in the order in which HF has them."""
        return tuple(self.axes.index(a) for a in self.hf_axes.replace(",", ""))

    def hf_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of the HF tensor."""
        sizes = _sizes(config)
        return tuple(math.prod(sizes[a] for a in dim) for dim in self.hf_axes.split(","))

    def from_hf(self, x: jax.Array, config: ModelConfig, **kwargs) -> jax.Array:
        """The parameter (of one layer) that a HF tensor holds: split axes, reorder them.

        Args:
          x: shape `hf_shape`.
          config: sizes of the axes.
          **kwargs: of reshape (out_sharding, in the order of hf_axes).
        """
        sizes, flat = _sizes(config), self.hf_axes.replace(",", "")
        split = x.reshape(tuple(sizes[a] for a in flat), **kwargs)
        return split.transpose([flat.index(a) for a in self.axes])

    def to_hf(self, x: np.ndarray, config: ModelConfig) -> np.ndarray:
        """The HF tensor of a parameter (of one layer): the inverse of `from_hf`."""
        return x.transpose(self.order).reshape(self.hf_shape(config))


def table(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows that a model of this configuration has."""
    rows = (*_ALWAYS, *(_BIAS if config.bias else ()))
    return rows if config.tie_word_embeddings else (*rows, _OUTPUT)


def hf_tensors(config: ModelConfig) -> Iterator[tuple[str, Weight, int | None]]:
    """Every HF tensor of a model: (name, row of the table, layer or None)."""
    for weight in table(config):
        for i in range(config.num_layers) if weight.stacked else (None,):
            yield weight.hf.format(i=i), weight, i


def resolve(model: Any, path: str) -> tuple[Any, str]:
    """(module, attribute) of a parameter's path."""
    owner, _, name = path.rpartition(".")
    return (operator.attrgetter(owner)(model) if owner else model), name


def is_known_extra(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints hold and no model needs.

    Rotary tables are recomputed; a tied model's output matrix is its embedding.
    """
    rotary = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
    return name.endswith(rotary) or (config.tie_word_embeddings and name == _OUTPUT.hf)


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
