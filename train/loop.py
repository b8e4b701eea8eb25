"""The story of a run: settle, read, compile, begin or resume, train, save, show a sample."""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from tqdm import tqdm

from models import load
from models.generate import generate
from models.internlm2 import InternLM2, init
from train.attention import dispatch_line
from train.checkpoint import Checkpoints
from train.config import Config
from train.data import Batch, Loader, default_cache, open_data
from train.defaults import Settled, settle
from train.evaluate import Evaluation, OpenSets, Sets
from train.flops import causal_pairs
from train.metrics import Metrics
from train.optim import optimizer, schedule
from train.signals import stop_on_signals
from train.state import Params, TrainState, abstract_state, new_state, params_of
from train.step import Step, batch_struct, compile_step, make_step, put_batch

say = functools.partial(print, flush=True)

PROMPT_TOKENS, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 32, 200, 0.8


def run(config: Config) -> None:
    """Trains to `config.steps`, or until a signal; saves; shows a sample.

    Raises:
        ValueError, NotImplementedError, OSError: what is wrong, in one line. What is wrong with
            the flags, the files or the shapes is found before anything is written.
        FloatingPointError: the loss is not finite; the checkpoints before it stand.
    """
    settled = settle(config)
    _introduce(config, settled)
    identity = _identity(config, settled)
    with Checkpoints(settled.out, keep=config.keep) as checkpoints:
        start = _starting_step(config, settled, checkpoints, identity)
        with (
            _open_data(config, settled, config.data.files, hold_out=config.data.hold_out) as loader,
            OpenSets(_open_val(config, settled)) as val,
        ):
            _say_data(loader, val.sets)
            tx = optimizer(config.optim, settled.lr, config.steps)
            graphdef, like = abstract_state(_maker(config, settled), tx, settled.mesh)
            if start:
                loader.restore(checkpoints.position())
                state = checkpoints.restore(like)
            else:
                checkpoints.check_space(like)
                state = new_state(_first_params(config, settled, like), tx, like)
            if start < config.steps:
                step = _compile(config, settled, graphdef, tx, state)
                save = functools.partial(checkpoints.save, identity=identity)
                settled.out.mkdir(parents=True, exist_ok=True)
                evaluate = Evaluation(
                    val.sets,
                    graphdef,
                    accum=config.accum,
                    mesh=settled.mesh,
                    path=settled.out / "eval.jsonl",
                    start=start,
                )
                state = _train(config, settled, step, state, start, loader, evaluate, save)
            batch = next(loader)
    params, done = state.params, int(state.step) == config.steps
    del state  # the optimizer's memory is worth having for the sample
    if done:
        _sample(config, settled, graphdef, params, batch)


def _train(
    config: Config,
    settled: Settled,
    step: Step,
    state: TrainState,
    start: int,
    loader: Loader,
    evaluate: Evaluation,
    save,
) -> TrainState:
    """Steps until the last one or a signal; every way out but an error saves."""
    metrics = Metrics(
        settled.out / "metrics.jsonl",
        model=settled.model,
        start=start,
        steps=config.steps,
        log_every=config.log_every,
    )
    waiting: tuple | None = None  # a step that the devices still work on: shown one step later
    try:
        with stop_on_signals() as stop:
            for number, batch in enumerate(loader, start + 1):
                position = loader.state()
                if number == start + 1:
                    _say_dispatch(config, settled, batch)
                state, values = step(state, put_batch(batch, accum=config.accum, mesh=settled.mesh))
                if waiting:
                    _check_finite(metrics.record(*waiting))
                waiting = (number, values, causal_pairs(batch.segment_ids))
                if number == config.steps or number % config.eval_every == 0:
                    evaluate(number, state.params)
                done = number == config.steps or stop.name is not None
                if done or number % config.save_every == 0:
                    _check_finite(metrics.record(*waiting))
                    waiting = None
                    save(state, data=position)
                if done:
                    break
    finally:
        metrics.close()
    if stop.name is not None and number < config.steps:
        say(f"stopped by {stop.name} after step {number}; the same command goes on from there")
    return state


def _say_data(loader: Loader, val: Sets) -> None:
    say(loader.report)
    for note in loader.report.notes():
        say(note)
    for name, of_val in val.items():
        say(f"validation on {name}: {of_val.report}")
        for note in of_val.report.notes():
            say(note)


def _say_dispatch(config: Config, settled: Settled, batch: Batch) -> None:
    micro = batch.segment_ids[: settled.rows // config.accum]
    tqdm.write(dispatch_line(config.attn, settled.model, settled.mesh, micro, dtype=settled.dtype))


def _introduce(config: Config, settled: Settled) -> None:
    mesh = " x ".join(f"{name} {size}" for name, size in settled.mesh.shape.items())
    for note in settled.notes:
        say(note)
    say(
        f"{settled.name}: {settled.model.num_params():,} parameters on {jax.device_count()} "
        f"{settled.mesh.devices.flat[0].device_kind} ({mesh}), {settled.dtype} compute; "
        f"{settled.rows} rows x {config.seq_len} tokens a step in {config.accum} parts; "
        f"peak learning rate {settled.lr:g}; tokenizer {settled.tokenizer.name}"
    )
    say(f"memory plan: {settled.plan}")


def _identity(config: Config, settled: Settled) -> dict[str, Any]:
    """What a checkpoint must share for a run to go on from it; `Loader.restore` adds the data."""
    return {
        **{f"model.{k}": v for k, v in dataclasses.asdict(settled.model).items()},
        "tokenizer": settled.tokenizer.fingerprint,
        "seq_len": config.seq_len,
        "seed": config.seed,
    }


def _starting_step(
    config: Config, settled: Settled, checkpoints: Checkpoints, identity: dict[str, Any]
) -> int:
    """The step to go on from, after checking that going on, or beginning, is possible."""
    _check_writable(settled.out)
    if checkpoints.latest is None:
        return 0
    if not config.resume:
        raise ValueError(
            f"{settled.out} holds a checkpoint of step {checkpoints.latest}, and --no_resume would "
            "overwrite it: choose another --out"
        )
    checkpoints.check(identity)
    if checkpoints.latest > config.steps:
        raise ValueError(
            f"{settled.out} is at step {checkpoints.latest}, beyond --steps={config.steps}: "
            "choose another --out or more --steps"
        )
    say(f"resuming from step {checkpoints.latest} of {settled.out}")
    if checkpoints.latest == config.steps:
        say(f"all {config.steps} steps are done: to train on, give more --steps")
    return checkpoints.latest


def _check_writable(out: Path) -> None:
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--out={out}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"--out={out}: no permission to write in {there}")


def _open_data(
    config: Config,
    settled: Settled,
    files: tuple[str, ...],
    *,
    hold_out: float = 0.0,
    split: Literal["train", "val"] = "train",
) -> Loader:
    return open_data(
        files or None,
        settled.tokenizer,
        seq_len=config.seq_len,
        batch_size=settled.rows,
        seed=config.seed,
        strict=config.data.strict,
        packing=config.data.packing if split == "train" else "fit",
        overlong=config.data.overlong,
        hold_out=hold_out,
        split=split,
        cache=Path(config.data.cache) if config.data.cache else default_cache(),
    )


def _open_val(config: Config, settled: Settled) -> Iterator[tuple[str, Loader]]:
    """Yields the name and the loader of every validation set."""
    if share := config.data.hold_out:
        loader = _open_data(config, settled, config.data.files, hold_out=share, split="val")
        yield "held_out", loader
        return
    for file in config.data.val:
        yield Path(file).stem, _open_data(config, settled, (file,))


def _maker(config: Config, settled: Settled):
    """Builds the model, under a trace: its weights are never made."""
    return lambda: InternLM2(
        settled.model,
        rngs=nnx.Rngs(params=config.seed),
        attn=settled.attn,
        dtype=settled.dtype,
        remat=config.remat,
    )


def _compile(
    config: Config, settled: Settled, graphdef: nnx.GraphDef, tx, like: TrainState
) -> Step:
    batch = batch_struct(
        rows=settled.rows, seq_len=config.seq_len, accum=config.accum, mesh=settled.mesh
    )
    begun = time.perf_counter()
    step = make_step(graphdef, tx, schedule(config.optim, settled.lr, config.steps))
    compiled = compile_step(step, like, batch)
    say(f"compiled the step in {time.perf_counter() - begun:.1f} s")
    return compiled


def _first_params(config: Config, settled: Settled, like: TrainState) -> Params:
    if settled.weights is not None:
        model = load(settled.weights, param_dtype="float32", mesh=settled.mesh)
        say(f"loaded the weights of {settled.weights}")
    else:
        model = init(settled.model, seed=config.seed, mesh=settled.mesh)
    return params_of(model, like)


def _check_finite(line: dict[str, Any]) -> None:
    if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
        raise FloatingPointError(
            f"step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}; not "
            "saved: go on from the checkpoint before it with a smaller --optim.lr"
        )


def _sample(
    config: Config, settled: Settled, graphdef: nnx.GraphDef, params: Params, batch: Batch
) -> None:
    """Lets the model go on from the beginning of a training row, and writes it down."""
    prompt = [int(t) for t in batch.tokens[0, :PROMPT_TOKENS]]
    [tokens] = generate(
        nnx.merge(graphdef, params),
        [prompt],
        max_new_tokens=SAMPLE_TOKENS,
        temperature=SAMPLE_TEMPERATURE,
        seed=config.seed,
    )
    decode = settled.tokenizer.decode
    text = f"{decode(prompt)}|{decode(tokens)}"
    (settled.out / "sample.txt").write_text(text + "\n")
    say(f"sample after {config.steps} steps (the prompt ends at |):\n{text}")
