"""The loop over steps: draw a batch, step, evaluate, save; until the last one or a signal."""

import contextlib

from train.announce import say, say_dispatch
from train.config import Config
from train.data import Loader
from train.defaults import Settled
from train.evaluate import Evaluation
from train.flops import causal_pairs
from train.metrics import Metrics
from train.signals import stop_on_signals
from train.skips import Skips
from train.state import TrainState
from train.step import Step, put_batch


def train(
    config: Config,
    settled: Settled,
    step: Step,
    state: TrainState,
    start: int,
    loader: Loader,
    evaluate: Evaluation,
    save,
) -> TrainState:
    """Steps until the last one or a signal.

    Every way out saves, but for an error that leaves no good state to save.

    Raises:
        FloatingPointError: too many steps in a row were skipped.
        TimeoutError: the data made no batch.
    """
    metrics = Metrics(
        settled.out / "metrics.jsonl",
        model=settled.model,
        start=start,
        steps=config.steps,
        log_every=config.log_every,
    )
    skips = Skips(
        settled.out / "skipped.jsonl", loader, patience=config.guard.patience, start=start
    )
    waiting: tuple | None = None  # a step that the devices still work on: shown one step later

    def show(following: tuple | None = None) -> None:
        nonlocal waiting
        ended, waiting = waiting, following
        if ended is not None:
            position, *shown = ended
            skips.look(metrics.record(*shown), position)

    number, done = start, False
    with contextlib.closing(metrics), stop_on_signals() as stop:
        try:
            while not done:
                position = loader.state()
                batch = loader.within(60 * config.data.stall_minutes)
                number += 1
                if number == start + 1:
                    say_dispatch(config, settled, batch)
                state, values = step(state, put_batch(batch, accum=config.accum, mesh=settled.mesh))
                show((position, number, values, causal_pairs(batch.segment_ids)))
                if number == config.steps or number % config.eval_every == 0:
                    evaluate(number, state.params)
                done = number == config.steps or stop.name is not None
                if done or number % config.save_every == 0:
                    show()
                    save(state, data=loader.state())
        except (FloatingPointError, TimeoutError):
            if waiting is not None:
                metrics.record(*waiting[1:])
            save(state, data=loader.state())
            raise
    if number < config.steps:
        say(f"stopped by {stop.name} after step {number}; the same command goes on from there")
    return state
