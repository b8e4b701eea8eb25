"""The loop over steps: draw a batch, step, evaluate, save; until the last one or a signal."""

import contextlib
import time
from collections.abc import Callable

import jax

from train.config.config import Config
from train.data import Loader
from train.distributed.hosts import Agreement, share
from train.log import say
from train.metrics.evaluate import Evaluation
from train.metrics.flops import causal_pairs
from train.metrics.skips import Skips
from train.run.announce import say_dispatch
from train.run.records import Evidence
from train.run.resolve import Settled
from train.run.signals import stop_on_signals
from train.step.state import TrainState
from train.step.step import Step, put_batch

SAVE, STOP = 1, 2  # what a process may wish for between two steps


def train(
    config: Config,
    settled: Settled,
    step: Step,
    state: TrainState,
    start: int,
    loader: Loader,
    evaluate: Evaluation,
    evidence: Evidence,
    save: Callable[..., None],
) -> TrainState:
    """Steps until the last one or a signal.

    Every way out saves, but for an error that leaves no good state to save.

    Raises:
        FloatingPointError: too many steps in a row were skipped.
        TimeoutError: the data made no batch.
    """
    skips = Skips(
        settled.out / "skipped.jsonl", loader, patience=config.guard.patience, start=start
    )
    agreed = Agreement(settled.mesh)
    _, parts = share(settled.mesh)
    waiting: tuple | None = None  # a step that the devices still work on: shown one step later

    def show(following: tuple | None = None) -> None:
        nonlocal waiting
        ended, waiting = waiting, following
        if ended is not None:
            position, *shown = ended
            skips.look(evidence.record(*shown), position)

    def keep(loss: float | None = None) -> None:
        with evidence.timed("checkpoint"):
            save(state, data=loader.state(), loss=loss)

    number, done, saved_at = start, False, time.monotonic()
    with contextlib.closing(evidence), stop_on_signals() as stop:
        try:
            while not done:
                position = loader.state()
                with evidence.timed("data"):
                    batch = loader.within(60 * config.data.stall_minutes)
                number += 1
                if number == start + 1:
                    say_dispatch(config, settled, batch)
                evidence.before(number, state)
                state, values = step(
                    state, put_batch(batch, grad_accum=config.grad_accum, mesh=settled.mesh)
                )
                # Other processes' documents are taken to be like these.
                show((position, number, values, causal_pairs(batch.segment_ids) * parts))
                losses = {}
                if number == config.steps or number % config.eval_every == 0:
                    with evidence.timed("evaluation", after=state):
                        losses = evaluate(number, state.params)
                evidence.after(number, state, losses)
                late = time.monotonic() - saved_at > 60 * config.save_minutes
                wish = agreed(STOP if stop.name is not None else SAVE if late else 0)
                done = number == config.steps or wish == STOP
                if done or wish == SAVE or number % config.save_every == 0:
                    show()
                    keep(sum(losses.values()) / len(losses) if losses else None)
                    saved_at = time.monotonic()
                    agreed.forget()
        except FloatingPointError:  # on all processes at the same step
            if waiting is not None:  # the step after the last one, skipped as those before
                position, *shown = waiting
                line = evidence.record(*shown)
                if line["in_a_row"]:
                    skips.write(line, position)
            keep()
            raise
        except TimeoutError:  # on one of several processes, which cannot save alone
            if jax.process_count() == 1 and number > start:
                show()
                keep()
            raise
    if number < config.steps:
        why = stop.name or "a signal to another process"
        say(f"stopped by {why} after step {number}; the same command goes on from there")
    return state
