"""`python -m train.main`: train a model. User errors are one line on stderr, not a traceback."""

import logging
import sys
from collections.abc import Sequence

import jax

from jaxattn.errors import first_line, is_out_of_memory
from models.cli import fail
from train.config.command_line import check_complete, config_notes, parse_flags
from train.config.recipes import recipe_list
from train.config.words import flatten_config
from train.distributed import device
from train.distributed.hosts import RESTART, check_same, connect, leave
from train.log import safe_console, set_up_logging
from train.run.dry_run import dry_run, print_config
from train.run.loop import run

log = logging.getLogger("train.main")  # also as __main__

USER_ERRORS = (ValueError, NotImplementedError, OSError, FloatingPointError)


@safe_console()
def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, by default those of the process, train, and return the exit status.

    Returns:
        0, also after a signal during training; 1 where the run is impossible or failed; 2 for a
        wrong flag; 130 after Ctrl-C outside of training, or after a second one.
    """
    notes: list[str] = []
    try:
        argv = sys.argv[1:] if argv is None else argv
        config = parse_flags(argv)
        if config.recipe == "list":
            print(recipe_list())
            return 0
        notes = config_notes(config)
        if not (config.dry_run or config.print_config):
            check_complete(config)
    except (ValueError, OSError) as error:
        for line in notes:  # the other settings that could not be mapped
            print(line)
        return fail(error, 2)
    try:
        connect(config.dist)
        device.set_up(keep_compiled=True)
        set_up_logging("debug" if config.verbose else config.log_level)
        check_same(flatten_config(config))
        if config.print_config:
            print_config(config, notes)
            return 0
        for line in notes:
            log.info(line)
        if config.dry_run:
            return 0 if dry_run(config) else 1
        run(config)
    except (*USER_ERRORS, jax.errors.JaxRuntimeError, KeyboardInterrupt) as error:
        reason = None if config.traceback else _reason(error)
        if reason is None:
            raise
        if jax.distributed.is_initialized():
            leave(reason)
        return fail(reason, 130 if isinstance(error, KeyboardInterrupt) else 1)
    return 0


def _reason(error: BaseException) -> str | None:
    """Return one line for people; None for an error of the program itself."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C; the same command begins anew, or from the last checkpoint"
    if is_out_of_memory(error):
        remedy = "a larger --grad_accum, --remat=full or a shorter --seq_len needs less"
        return f"out of memory; {remedy} ({first_line(error)})"
    runtime = isinstance(error, jax.errors.JaxRuntimeError)
    # jax raises the error of a CPU collective as ValueError.
    if jax.distributed.is_initialized() and (runtime or "Gloo" in str(error)):
        return f"another process of the run has ended or does not answer: {RESTART}"
    return None if runtime else str(error)


if __name__ == "__main__":
    sys.exit(main())
