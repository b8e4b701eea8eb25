"""The loop over steps: draw a batch, step, evaluate, save; until the last one or a signal."""

import math
from typing import Any

from train.announce import say, say_dispatch
from train.config import Config
from train.data import Loader
from train.defaults import Settled
from train.evaluate import Evaluation
from train.evidence import Evidence
from train.flops import causal_pairs
from train.signals import stop_on_signals
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
    evidence: Evidence,
    save,
) -> TrainState:
    """Steps until the last one or a signal; every way out but an error saves."""
    waiting: tuple | None = None  # a step that the devices still work on: shown one step later
    try:
        with stop_on_signals() as stop:
            for number in range(start + 1, config.steps + 1):
                with evidence.timed("data"):
                    batch = next(loader)
                position = loader.state()
                if number == start + 1:
                    say_dispatch(config, settled, batch)
                evidence.before(number, state)
                state, values = step(state, put_batch(batch, accum=config.accum, mesh=settled.mesh))
                if waiting:
                    _check_finite(evidence.record(*waiting))
                waiting = (number, values, causal_pairs(batch.segment_ids))
                losses = {}
                if number == config.steps or number % config.eval_every == 0:
                    with evidence.timed("evaluation", after=state):
                        losses = evaluate(number, state.params)
                evidence.after(number, state, losses)
                done = number == config.steps or stop.name is not None
                if done or number % config.save_every == 0:
                    _check_finite(evidence.record(*waiting))
                    waiting = None
                    with evidence.timed("checkpoint"):
                        save(state, data=position)
                if done:
                    break
    finally:
        evidence.close()
    if stop.name is not None and number < config.steps:
        say(f"stopped by {stop.name} after step {number}; the same command goes on from there")
    return state


def _check_finite(line: dict[str, Any]) -> None:
    if not math.isfinite(line["loss"]) or not math.isfinite(line["grad_norm"]):
        raise FloatingPointError(
            f"step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']}; not "
            "saved: go on from the checkpoint before it with a smaller --optim.lr"
        )
