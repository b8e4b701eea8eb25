"""What a run is put together from: data, model, compiled step, first weights."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from flax import nnx

from models import load
from models.execution import Execution
from models.internlm2 import InternLM2, init
from train.config.config import MOST_STEPS, Config
from train.data import Loader, Packing, default_cache, open_data
from train.distributed.device import compiler_options
from train.distributed.hosts import share
from train.log import say
from train.run.resolve import Settled
from train.step.lr_schedule import schedule
from train.step.state import Params, TrainState, params_of
from train.step.step import Step, batch_struct, compile_step, make_step


def with_steps(config: Config, rows: int, in_step: int) -> Config:
    """The configuration with the steps that its epochs come to.

    Args:
        config: with steps, or epochs.
        rows: of the data.
        in_step: rows of a step.

    Raises:
        ValueError: these are too many, or fewer than --profile wants.
    """
    if config.epochs is None:
        return config
    steps = config.epochs * rows / in_step
    if steps > MOST_STEPS:
        raise ValueError(
            f"--epochs={config.epochs:g} of {rows:,} rows are {steps:.3g} steps, must be at most "
            f"{MOST_STEPS:,}"
        )
    config = dataclasses.replace(config, steps=max(1, math.ceil(steps)))
    say(f"{config.epochs:g} epochs of {rows:,} rows are {config.steps:,} steps")
    config.check_profile()
    return config


def open_training(config: Config, settled: Settled) -> Loader:
    """Opens what is trained on."""
    data = config.data
    return _open(config, settled, data.files, packing=data.packing, hold_out=data.hold_out)


def open_validation(config: Config, settled: Settled) -> Iterator[tuple[str, Loader]]:
    """Yields the name and the loader of every validation set.

    Documents are whole, whatever training does to them: losses can be compared.
    """
    open_whole = functools.partial(_open, config, settled, packing="fit")
    if share := config.data.hold_out:
        yield "held_out", open_whole(config.data.files, hold_out=share, split="val")
        return
    for file in config.data.val or ():
        yield Path(file).stem, open_whole((file,))


def _open(
    config: Config,
    settled: Settled,
    files: tuple[str, ...] | None,
    *,
    packing: Packing,
    hold_out: float = 0.0,
    split: Literal["train", "val"] = "train",
) -> Loader:
    """Opens files, or the built-in text where there are none, as batches of this run."""
    index, count = share(settled.mesh)
    return open_data(
        files,
        settled.tokenizer,
        seq_len=config.seq_len,
        batch_size=settled.rows,
        seed=config.seed,
        strict=config.data.strict,
        packing=packing,
        too_long=config.data.too_long,
        hold_out=hold_out,
        split=split,
        cache=Path(config.data.cache) if config.data.cache else default_cache(),
        host_index=index,
        host_count=count,
    )


def model_maker(config: Config, settled: Settled):
    """Builds the model, under a trace: its weights are never made."""
    return lambda: InternLM2(
        settled.model,
        rngs=nnx.Rngs(params=config.seed),
        execution=Execution(
            attn=settled.attn,
            deterministic=config.deterministic,
            dtype=settled.dtype,
            param_dtype=settled.param_dtype,
            remat=settled.remat,
            scan=settled.scan,
        ),
    )


def first_params(config: Config, settled: Settled, like: TrainState) -> Params:
    """The weights that a new run begins with: loaded, or random; in `like`'s shards."""
    if settled.weights is not None:
        model = load(
            settled.weights,
            execution=Execution(param_dtype=settled.param_dtype),
            mesh=settled.mesh,
        )
        say(f"loaded the weights of {settled.weights}")
    else:
        model = init(settled.model, seed=config.seed, mesh=settled.mesh)
    return params_of(model, like)


def compile_training(
    config: Config, settled: Settled, graphdef: nnx.GraphDef, tx, like: TrainState
) -> Step:
    """Compiles the training step for the run's shapes, and says how long it took."""
    batch = batch_struct(
        rows=settled.rows, seq_len=config.seq_len, grad_accum=config.grad_accum, mesh=settled.mesh
    )
    begun = time.perf_counter()
    rate = schedule(config.optim, settled.lr, config.steps)
    step = make_step(graphdef, tx, rate, spike=config.guard.spike, z_loss=config.z_loss)
    options = compiler_options(deterministic=config.deterministic)
    compiled = compile_step(step, like, batch, options)
    say(f"compiled the step in {time.perf_counter() - begun:.1f} s")
    return compiled
