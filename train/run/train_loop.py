"""Loop over steps: draw a batch, step, evaluate, save; until the last step or a stop request."""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from train.data.loader import Loader
from train.data.pack.packing import Batch
from train.distributed.hosts import RequestReducer, share
from train.metrics.evaluate import Evaluation
from train.metrics.flops import causal_pairs
from train.metrics.skips import Skips
from train.run.recorder import Recorder
from train.run.resolve import Run
from train.run.signals import stop_on_signals
from train.run.summary import log_dispatch
from train.step.state import TrainState
from train.step.step import Step, put_batch

log = logging.getLogger(__name__)

SAVE, STOP = 1, 2  # requests of a process, for `RequestReducer`


class Pending(NamedTuple):
    """A step that the devices still compute; its values are recorded one step later."""

    position: dict
    """Data position before its batch."""

    step: int
    """Number of the step, from 1."""

    values: dict[str, jax.Array]
    """Metrics of the step, float32 scalars on the devices."""

    pairs: int
    """Causal query-key pairs inside the documents of the batch."""


def train(
    run: Run,
    step: Step,
    state: TrainState,
    start: int,
    loader: Loader,
    evaluate: Evaluation,
    recorder: Recorder,
    save: Callable[..., None],
    export: Callable[[TrainState], None],
) -> TrainState:
    """Train until the last step or a stop request, and save a checkpoint at the end.

    Args:
        run: The run.
        step: The compiled step.
        state: State after `start` steps; donated.
        start: Steps that are done.
        loader: Training data, at the position of `start`.
        evaluate: Validation.
        recorder: Metrics and samples; closed at the end.
        save: (state, data=position, loss=validation loss or None) -> None.
        export: Begins an export of the weights.

    Raises:
        FloatingPointError: Too many steps in a row were skipped; saved all the same.
        TimeoutError: The data made no batch in time; saved if there is one process.
        Exception: Any other error of the host, such as a full disk for metrics.jsonl; saved if
            there is one process and the state is intact.
    """
    config = run.config
    skips = Skips(run.out / "skipped.jsonl", loader, patience=config.guard.patience, start=start)
    reduce_request = RequestReducer(run.real_mesh)
    _, parts = share(run.real_mesh)
    pending: Pending | None = None
    can_save = jax.process_count() == 1  # one of several processes cannot save alone

    def record_pending(following: Pending | None = None) -> None:
        nonlocal pending
        ended, pending = pending, following
        if ended is not None:
            skips.look(recorder.record(ended.step, ended.values, ended.pairs), ended.position)

    def checkpoint(loss: float | None = None) -> None:
        nonlocal can_save
        can_save = False  # where this raises, there is no second attempt
        with recorder.timed("checkpoint"):
            save(state, data=next_position, loss=loss)
        can_save = True

    def put(batch: Batch) -> Batch:
        if not run.packed:
            batch = batch._replace(segment_ids=None)
        return put_batch(batch, grad_accum=config.grad_accum, mesh=run.real_mesh)

    next_position = loader.state()  # after the last batch that a step has used
    number, done, saved_at = start, False, time.monotonic()
    with contextlib.closing(recorder), stop_on_signals() as stop:
        try:
            while not done:
                position = loader.state()
                with recorder.timed("data"):
                    batch = loader.next(timeout=60 * config.data.stall_minutes)
                if number == start:
                    log_dispatch(run, batch)
                recorder.before_step(number + 1, state)
                state, values = step(state, put(batch))
                number, next_position = number + 1, loader.state()
                # The documents of other processes are assumed to be like these.
                pairs = causal_pairs(batch.segment_ids) * parts
                record_pending(Pending(position, number, values, pairs))
                losses = {}
                if number == run.steps or number % config.eval_every == 0:
                    with recorder.timed("evaluation", after=state):
                        losses = evaluate(number, state.weights)
                recorder.after_step(number, state, losses)
                late = time.monotonic() - saved_at > 60 * config.save_minutes
                request = reduce_request(STOP if stop.name is not None else SAVE if late else 0)
                done = number == run.steps or request == STOP
                if done or request == SAVE or number % config.save_every == 0:
                    record_pending()
                    checkpoint(sum(losses.values()) / len(losses) if losses else None)
                    saved_at = time.monotonic()
                    reduce_request.forget()
                every = config.export_every
                if every and (number == run.steps or number % every == 0):
                    with recorder.timed("checkpoint", after=state):
                        export(state)
        except FloatingPointError:  # on all processes at the same step
            if pending is not None:  # the step after the last one, skipped as those before
                line = recorder.record(pending.step, pending.values, pending.pairs)
                if line["in_a_row"]:
                    skips.write(line, pending.position)
            checkpoint()
            raise
        except Exception:
            if can_save and number > start:
                with contextlib.suppress(Exception):
                    record_pending()
                with contextlib.suppress(Exception):  # the first error is the one to report
                    checkpoint()
            raise
    if number < run.steps:
        why = stop.name or "a signal to another process"
        log.info(f"stopped by {why} after step {number}; the same command resumes from there")
    return state
