"""`python -m train.main`: trains. What a person did wrong is one line, not a traceback."""

import sys
from collections.abc import Sequence

import jax

from train import device
from train.cli import fail, parse
from train.config import Config
from train.dry_run import dry_run
from train.loop import run
from train.recipes import check_recipe, find_recipe, recipe_list


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, trains, and returns the exit status.

    Args:
        argv: the flags; by default the process's.

    Returns:
        0, also after a signal; 1 where the run cannot be done or went wrong; 2 where a flag is
        wrong.
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
    device.set_up(keep_compiled=True)
    try:
        (dry_run if config.dry_run else run)(config)
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        if config.traceback:
            raise
        return fail(error, 1)
    except jax.errors.JaxRuntimeError as error:
        if config.traceback or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fail(
            f"out of memory; a larger --accum or a shorter --seq_len needs less: {error}", 1
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
