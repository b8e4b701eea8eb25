"""`python -m train.main`: trains. What a person did wrong is one line, not a traceback."""

import sys
from collections.abc import Sequence

import jax

from jaxattn.errors import first_line, is_out_of_memory
from train.config.cli import fail, parse
from train.config.config import Config
from train.config.recipes import check_recipe, find_recipe, recipe_list
from train.distributed import device
from train.distributed.hosts import check_same, connect
from train.distributed.peers import Peers, leave
from train.run.dry_run import dry_run
from train.run.flatten import resolved
from train.run.loop import run


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, trains, and returns the exit status.

    Args:
        argv: the flags; by default the process's.

    Returns:
        0, also after a signal while it trains; 1 where the run cannot be done or went wrong; 2
        where a flag is wrong; 130 after Ctrl-C before or behind training, or twice.
    """
    try:
        argv = sys.argv[1:] if argv is None else argv
        config = parse(Config, argv, "train.main", default=find_recipe(argv))
        if config.recipe == "list":
            print(recipe_list())
            return 0
        check_recipe(config)
    except ValueError as error:
        return fail(error, 2)
    try:
        connect(config.dist)
        device.set_up(keep_compiled=True)
        with Peers():
            check_same(resolved(config))
            (dry_run if config.dry_run else run)(config)
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        if config.traceback:
            raise
        return _failed(error)
    except KeyboardInterrupt:  # in training the first one is a wish, see train/run/signals.py
        if config.traceback:
            raise
        _failed("stopped by Ctrl-C; the same command begins anew, or from the last checkpoint")
        return 130
    except jax.errors.JaxRuntimeError as error:
        if config.traceback:
            raise
        if is_out_of_memory(error):
            return _failed(
                "out of memory; a larger --grad_accum or a shorter --seq_len needs less: "
                f"{first_line(error)}"
            )
        if jax.process_count() == 1:
            raise
        return _failed(
            "another process of the run has ended or does not answer; start all of them again, "
            f"and they go on from the last checkpoint ({first_line(error):.200})"
        )
    return 0


def _failed(error: object) -> int:
    """Says what went wrong. One of several processes leaves at once, which ends the others."""
    if not jax.distributed.is_initialized():
        return fail(error, 1)
    leave(str(error))


if __name__ == "__main__":
    sys.exit(main())
