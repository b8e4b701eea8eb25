"""A model small enough to compile in seconds, on any mesh of 8 devices."""

import numpy as np
import pytest

from models.config import PRESETS, ModelConfig
from train.data import Batch

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
)


@pytest.fixture
def tiny(monkeypatch) -> ModelConfig:
    """The tiny model, also by name: `--model=tiny`."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    return TINY


@pytest.fixture
def packed_rows() -> Batch:
    """8 rows of 24: two documents and padding in each, with as many targets as rows differ."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.array([[1, 2, 0]], np.int32), [10, 9, 5], axis=1).repeat(8, axis=0)
    ids[3:] = 1  # rows of one document have more targets: a mean of means would differ
    positions = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    positions[:3, 10:19] -= 10
    mask = (ids > 0).astype(np.float32)
    mask[:, -1] = mask[:3, 9] = mask[:3, 18] = 0
    return Batch(
        tokens=rng.integers(3, 320, ids.shape, dtype=np.int32),
        targets=rng.integers(3, 320, ids.shape, dtype=np.int32),
        loss_mask=mask,
        segment_ids=ids,
        positions=positions,
    )
