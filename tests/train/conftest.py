"""A model small enough to compile in seconds, on any mesh of 8 devices."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models.config import PRESETS, ModelConfig
from models.execution import Execution
from models.internlm2 import InternLM2, init
from train.config.config import Config
from train.config.sections import DataConfig, OptimConfig
from train.data import Batch
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


@pytest.fixture(scope="session")
def tiny() -> Iterator[ModelConfig]:
    """The tiny model, also by name: `--model=tiny`."""
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


OUTSIDE_OF_THE_STEP = {
    **{"out": None, "data": DataConfig(), "prompts": (), "sample_every": 0, "profile": None},
    **{"save_every": 1, "eval_every": 1, "log_every": 1, "log": (), "chat": False},
}
"""Flags that change what a run reads, writes and says, but not its step."""


@pytest.fixture(scope="session")
def tiny_run(tiny, said_by) -> Iterator[Callable[..., Config]]:
    """Makes the config of one and the same run of 8 steps, in a directory of its own.

    As long as it lives, runs that differ in what the step does not depend on share a compiled one.
    """
    compiled = {}
    compile_step = loop.compile_training

    def compile_once(config, *rest):
        key = dataclasses.replace(config, **OUTSIDE_OF_THE_STEP)
        if key not in compiled or config.out == said_by:  # the run whose words are a test's
            compiled[key] = compile_step(config, *rest)
        return compiled[key]

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

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_training", compile_once)
        yield config


@pytest.fixture(scope="session")
def said_by(tmp_path_factory) -> str:
    """The directory of `finished`."""
    return str(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def finished(tiny_run, said_by) -> Path:
    """The directory of that run, trained to its end; what it said is in <directory>.log."""
    out = Path(said_by)
    with out.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        loop.run(tiny_run(out))
    return out
