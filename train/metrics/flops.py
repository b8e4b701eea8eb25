"""Useful floating-point operations of a training step, for MFU (model FLOPs utilization).

    6 * (parameters - embedding table) * tokens + 12 * L * N * H * pairs

where pairs are the causal query-key pairs inside documents. With LoRA the factor of the frozen
parameters is 4, because they have no gradient, and that of the adapters 6. Masked pairs and
recomputation in the backward pass do not count. The output matrix counts, the look-up in the
embedding table does not.

References:
    "PaLM", Chowdhery et al. 2022, appendix B, for MFU; there pairs are all T * T.
"""

import numpy as np
from jaxtyping import Array, Int

from models.config import ModelConfig
from models.lora import LoRA, adapter_params_count


def causal_pairs(segment_ids_BT: Int[np.ndarray | Array, "B T"]) -> int:
    """Count (query, key) pairs with key <= query in the same document; padding (0) has none.

    A document of n tokens has n * (n + 1) / 2.
    """
    pairs = 0
    for row_T in np.asarray(segment_ids_BT):
        starts = np.flatnonzero(np.diff(row_T, prepend=row_T[0] - 1))
        lengths = np.diff(starts, append=len(row_T)).astype(np.int64)
        pairs += int(np.sum((lengths * (lengths + 1) // 2)[row_T[starts] != 0]))
    return pairs


def training_flops(
    config: ModelConfig, tokens: int, pairs: int, *, lora: LoRA | None = None
) -> float:
    """Return the floating-point operations of a forward and a backward pass.

    `tokens` are counted without padding, `pairs` by `causal_pairs`; `lora` are the adapters, if
    only they are trained.
    """
    table = config.vocab_size * config.hidden_size
    looked_up = 0 if config.tie_word_embeddings else table
    attention = 12 * config.num_layers * config.num_heads * config.head_dim
    products = (6.0 if lora is None else 4.0) * (config.num_params() - looked_up)
    if lora is not None:
        products += 6.0 * adapter_params_count(lora, config)
    return products * tokens + float(attention) * pairs
