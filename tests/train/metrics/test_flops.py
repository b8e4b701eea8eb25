"""FLOPs and causal pairs match the formula and a count by brute force."""

import numpy as np

from models.config import PRESETS
from models.lora import LoRA, adapter_params_count
from train.metrics.flops import causal_pairs, training_flops


def test_pairs_by_brute_force():
    """Documents that repeat an id after another one are two; padding has none."""
    ids = np.array([[1, 1, 2, 2, 2, 1, 0, 0], [1] * 8, [0] * 8], np.int32)
    want = 0
    for row in ids:
        document = np.cumsum(np.diff(row, prepend=row[0]) != 0)
        for i in range(8):
            want += sum(row[i] != 0 and document[i] == document[j] for j in range(i + 1))
    assert causal_pairs(ids) == want == 3 + 6 + 1 + 36


def test_dense_32k_step_of_the_1_8b_model():
    """Matrix products 3.34e14 FLOP, and attention 24 layers x 12 N H pairs."""
    config, T = PRESETS["internlm2-1.8b"], 32_768
    pairs = causal_pairs(np.ones((1, T), np.int32))
    assert pairs == T * (T + 1) // 2
    products = training_flops(config, T, 0)
    assert products == 6 * 1_699_579_904 * T
    assert training_flops(config, T, pairs) - products == 12 * 24 * 2048 * pairs


def test_frozen_weights_have_no_gradient():
    config, lora = PRESETS["internlm2-1.8b"], LoRA(rank=8, alpha=16.0)
    full, adapters = training_flops(config, 10, 0), training_flops(config, 10, 0, lora=lora)
    assert adapters == full * 4 / 6 + 60 * adapter_params_count(lora, config)
