"""Train from the flags to the last checkpoint: resolve, read, compile, start or resume, sample."""

import functools
import logging
import time
from typing import Any

import jax

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.exports import Exports
from train.config.config import Config
from train.distributed.device import compiler_options
from train.metrics.evaluate import Evaluation, OpenSets
from train.metrics.sinks import check_sinks
from train.metrics.summary_table import log_table
from train.run.build import (
    abstract_training,
    check_rows_for_attention,
    compile_training,
    initial_params,
    open_training,
    open_validation,
)
from train.run.export import export_assets, restore_export, take_export
from train.run.recorder import Recorder, check_recorder
from train.run.resolve import resolve
from train.run.resume import check_out, check_resume, check_still_new, identity_of, read_checkpoint
from train.run.run_lock import RunLock
from train.run.sample import write_sample
from train.run.summary import describe_run, flags_in_use, log_data, log_end, save_config
from train.run.train_loop import train
from train.step.state import TrainState, new_frozen, new_state

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Train to the last step or until a signal, save, and write a sample.

    Raises:
        ValueError, NotImplementedError, OSError: The run is impossible; the message is one line.
            Wrong flags, files and shapes are found before anything is written.
        FloatingPointError: Too many steps in a row were skipped; the weights before are saved.
    """
    begun = time.monotonic()
    run = resolve(config)
    run.check_memory()
    check_sinks(config.log)
    check_recorder(config)
    assets = export_assets(run)
    for line in describe_run(run):
        log.info(line)
    identity = identity_of(run)
    check_out(run.out)
    with RunLock(run.out) as run_lock:
        run_lock.acquire()
        with (
            Checkpoints(
                run.out, keep_last=config.keep_last, keep_best=config.keep_best
            ) as checkpoints,
            Exports(run.out, keep=config.export_keep) as exports,
        ):
            saved = read_checkpoint(run, checkpoints, identity)
            with open_training(run) as loader, OpenSets(open_validation(run)) as validation:
                log_data(loader, validation.sets)
                check_rows_for_attention(run, loader, *validation.sets.values())
                run = run.with_epochs(loader.report.rows)
                if config.epochs is not None:
                    rows = loader.report.rows
                    log.info(f"{config.epochs:g} epochs of {rows:,} rows are {run.steps:,} steps")
                if saved is not None:
                    assert checkpoints.latest is not None
                    check_resume(run, checkpoints.latest, saved, loader)
                tx, graphdef, like = abstract_training(run)
                checkpoints.remove_partial()
                if saved is None:
                    checkpoints.check_space(like)
                    state = new_state(initial_params(run, like), tx, like)
                else:
                    state, position = checkpoints.restore(like._replace(frozen=None))
                    loader.restore(position)
                    if like.frozen is not None:  # no checkpoint has them
                        state = state._replace(frozen=new_frozen(initial_params(run, like), like))
                start = int(state.step)

                def export(state: TrainState) -> None:
                    exports.save(int(state.step), lambda: take_export(run, assets, graphdef, state))

                if start == run.steps:
                    log.info(f"all {run.steps} steps are done: to train on, give more --steps")
                    if config.export_every:
                        exports.begin(start)
                        restore_export(run, exports, start, functools.partial(export, state))
                else:
                    step = compile_training(run, tx, graphdef, state, len(loader.sources))
                    if config.export_every:  # compiles, and finds at once what would fail
                        take_export(run, assets, graphdef, state)
                    run.out.mkdir(parents=True, exist_ok=True)
                    run_lock.acquire()
                    check_still_new(run, saved)
                    exports.begin(start)
                    if config.export_every and start:
                        restore_export(run, exports, start, functools.partial(export, state))
                    evaluate = Evaluation(
                        validation.sets,
                        graphdef,
                        grad_accum=config.grad_accum,
                        mesh=run.real_mesh,
                        path=run.out / "eval.jsonl",
                        start=start,
                        options=compiler_options(
                            deterministic=config.deterministic, matmul=config.matmul
                        ),
                    )
                    recorder = Recorder(run, graphdef, start, loader.sources)
                    save_config(run)
                    flags = flags_in_use(run)

                    def save(state: TrainState, **options: Any) -> None:
                        checkpoints.save(state, identity=identity, config=flags, **options)

                    state = train(run, step, state, start, loader, evaluate, recorder, save, export)
                batch = next(loader)
    params, done = state.weights, int(state.step) == run.steps
    del state  # the sample can use the memory of the optimizer
    if done:
        write_sample(run, graphdef, params, batch)
        log_end(run, time.monotonic() - begun, chat=loader.report.has_chats)
        if jax.process_index() == 0:
            log_table(run.out)
