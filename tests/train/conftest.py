"""A model small enough to compile in seconds, on any mesh of 8 devices."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models.config import PRESETS, ModelConfig
from models.execution import Execution
from models.internlm2 import InternLM2, init
from train.config.config import Config
from train.config.sections import OptimConfig
from train.data.pack.packing import Batch
from train.log import set_up_logging
from train.run import loop

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
)


@pytest.fixture(autouse=True)
def own_token_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "user_cache"))


@pytest.fixture(scope="session", autouse=True)
def logging_to_stdout():
    """Log lines are written to stdout, as under `train.main`."""
    set_up_logging()


@pytest.fixture(scope="session")
def tiny() -> Iterator[ModelConfig]:
    """Register the tiny model by name, for `--model=tiny`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield TINY


@pytest.fixture(scope="session")
def tiny_model(tiny) -> InternLM2:
    """Its weights, drawn once, on one device, in float32."""
    return init(tiny, execution=Execution(dtype=jnp.float32, attn="eager"))


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
    """Make the config of one and the same run of 8 steps, in a directory of its own.

    The step is compiled once: jax's compilation cache of the session (tests/conftest.py) has it.
    """

    def config(out: Path) -> Config:
        return Config(
            model="tiny",
            attn="sdpa",
            seq_len=64,
            batch_size=8,
            steps=8,
            save_every=3,
            optim=OptimConfig(lr=1e-2),
            out=str(out),
        )

    return config


@pytest.fixture(scope="session")
def finished(tiny_run, tmp_path_factory) -> Path:
    """Return the directory of that run, trained to its end; <directory>.log has its log."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with out.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        loop.run(tiny_run(out))
    return out
