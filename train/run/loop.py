"""The story of a run: settle, read, compile, begin or resume, train, save, show a sample."""

import dataclasses
import functools

from train.checkpoint.checkpoints import Checkpoints
from train.config.config import Config
from train.distributed.device import compiler_options
from train.log import say
from train.metrics.evaluate import Evaluation, OpenSets
from train.metrics.sinks import check_sinks
from train.run.announce import introduce, say_data
from train.run.flatten import save_config
from train.run.parts import (
    compile_training,
    first_params,
    model_maker,
    open_training,
    open_validation,
    with_steps,
)
from train.run.records import Evidence
from train.run.resolve import settle
from train.run.resume import check_not_beyond, check_out, identity_of, starting_step
from train.run.run_lock import RunLock
from train.run.sample import write_sample
from train.run.stepping import train
from train.step.optim import optimizer
from train.step.state import abstract_state, new_state


def run(config: Config) -> None:
    """Trains to `config.steps`, or until a signal; saves; shows a sample.

    Raises:
        ValueError, NotImplementedError, OSError: what is wrong, in one line. What is wrong with
            the flags, the files or the shapes is found before anything is written.
        FloatingPointError: the loss is not finite; the checkpoints before it stand.
    """
    settled = settle(config)
    check_sinks(config.log)
    introduce(config, settled)
    identity = identity_of(config, settled)
    with (
        RunLock(settled.out) as run_lock,
        Checkpoints(
            settled.out, keep_last=config.keep_last, keep_best=config.keep_best
        ) as checkpoints,
    ):
        check_out(settled.out)
        run_lock.claim()
        start = starting_step(config, settled, checkpoints, identity)
        with (
            open_training(config, settled) as loader,
            OpenSets(open_validation(config, settled)) as val,
        ):
            say_data(loader, val.sets)
            config = with_steps(config, loader.report.rows, settled.rows)
            check_not_beyond(config, settled, checkpoints)
            tx = optimizer(config.optim, settled.lr, config.steps, param_dtype=settled.param_dtype)
            graphdef, like = abstract_state(model_maker(config, settled), tx, settled.mesh)
            checkpoints.remove_half_written()
            if start:
                state, position = checkpoints.restore(like)
                loader.restore(position)
                start = int(state.step)
            else:
                checkpoints.check_space(like)
                state = new_state(first_params(config, settled, like), tx, like)
            if start == config.steps:
                say(f"all {config.steps} steps are done: to train on, give more --steps")
            else:
                step = compile_training(config, settled, graphdef, tx, state)
                save = functools.partial(
                    checkpoints.save, identity=identity, config=dataclasses.asdict(config)
                )
                settled.out.mkdir(parents=True, exist_ok=True)
                run_lock.claim()
                evaluate = Evaluation(
                    val.sets,
                    graphdef,
                    grad_accum=config.grad_accum,
                    mesh=settled.mesh,
                    path=settled.out / "eval.jsonl",
                    start=start,
                    options=compiler_options(deterministic=config.deterministic),
                )
                evidence = Evidence(config, settled, graphdef, start)
                save_config(config, settled)
                state = train(config, settled, step, state, start, loader, evaluate, evidence, save)
            batch = next(loader)
    params, done = state.params, int(state.step) == config.steps
    del state  # the optimizer's memory is worth having for the sample
    if done:
        write_sample(config, settled, graphdef, params, batch)
