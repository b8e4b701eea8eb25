"""A model small enough to compile in seconds, on any mesh of 8 devices."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from models.config import PRESETS, ModelConfig
from train.config import Config
from train.data import Batch
from train.loop import run

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
)


@pytest.fixture(scope="session")
def tiny() -> Iterator[ModelConfig]:
    """The tiny model, also by name: `--model=tiny`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield TINY


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def tiny_run(tiny) -> Callable[..., Config]:
    """Makes the config of one and the same run of 8 steps, in a directory of its own."""

    def config(out: Path, **changes) -> Config:
        same = {"model": "tiny", "seq_len": 64, "batch_size": 8, "steps": 8, "save_every": 3}
        return Config(**(same | {"out": str(out)} | changes))

    return config


@pytest.fixture(scope="session")
def finished(tiny_run, tmp_path_factory) -> Path:
    """The directory of that run, trained to its end without interruption."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(tiny_run(out))
    return out
