"""The story of a run: settle, read, compile, resume or begin, train, save, show a sample."""

import dataclasses
import functools
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import load_hf
from models.generate import generate
from models.internlm2 import InternLM2, init
from train.attention import dispatch_line
from train.checkpoint import Checkpoints
from train.config import Config
from train.data import Batch, Loader, open_data
from train.defaults import Settled, settle
from train.flops import causal_pairs
from train.metrics import Metrics
from train.optim import optimizer, schedule
from train.signals import stop_on_signals
from train.state import TrainState, abstract_state, new_state, params_of
from train.step import Step, compile_step, make_step, put_batch

say = functools.partial(print, flush=True)

PROMPT_TOKENS, SAMPLE_TOKENS = 32, 200


def run(config: Config) -> None:
    """Trains to `config.steps`, or until a signal; saves; shows a sample.

    Raises:
        ValueError, NotImplementedError, OSError: what is wrong, in one line; nothing was written
            if it was found before the first step.
        FloatingPointError: the loss is not finite; the checkpoints before it stand.
    """
    settled = settle(config)
    _introduce(settled, config)
    checkpoints = Checkpoints(settled.out, keep=config.keep)
    with open_data(
        config.data.files or None,
        settled.tokenizer,
        seq_len=config.seq_len,
        batch_size=settled.rows,
        seed=config.seed,
        strict=config.data.strict,
    ) as loader:
        say(loader.report)
        identity = _identity(config, settled, loader)
        start = _starting_step(config, settled.out, checkpoints, identity)
        tx = optimizer(config.optim, settled.lr, config.steps)
        graphdef, like = abstract_state(_maker(config, settled), tx, settled.mesh)
        first = next(loader)
        prompt = _prompt(first)
        if start < config.steps:
            step = _compile(config, settled, graphdef, tx, like, first)
        if start:
            state, position = checkpoints.restore(like)
            loader.restore(position)
        else:
            state = new_state(_first_params(config, settled), tx, like)
            loader.restore(loader_start(loader))
        if start < config.steps:
            state = _train(config, settled, step, state, start, loader, checkpoints, identity)
        checkpoints.close()
    if int(state.step) == config.steps:
        _sample(graphdef, state, settled, prompt, config.seed)


def _train(config, settled, step, state, start, loader, checkpoints, identity) -> TrainState:
    ...
