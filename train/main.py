"""`python -m train.main`: the command line. Errors of the person who typed are one line each."""

import contextlib
import difflib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro

from train.config import Config
from train.loop import run

USAGE, FAILED = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, trains, and returns the exit status.

    Args:
        argv: the flags; by default the process's.

    Returns:
        0; 1 where the run cannot be done or went wrong; 2 where a flag is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = parse(argv)
    except ValueError as error:
        return _fail(error, USAGE)
    _set_up_jax()
    try:
        run(config)
    except (ValueError, NotImplementedError, OSError, FloatingPointError) as error:
        if config.traceback:
            raise
        return _fail(error, FAILED)
    except jax.errors.JaxRuntimeError as error:
        if config.traceback or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(f"out of memory, take a smaller --batch_size or a larger --accum: {error}", 1)
    return 0


def parse(argv: Sequence[str]) -> Config:
    """Reads the flags; `--help` prints them and exits.

    Raises:
        ValueError: what is wrong, in one line, with the nearest flag if one is unknown.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                Config,
                prog="python -m train.main",
                args=list(argv),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_reason(said.getvalue())) from stop
    if unknown:
        raise ValueError(_unknown(unknown[0]))
    return config


def _unknown(argument: str) -> str:
    flag = argument.split("=")[0]
    near = difflib.get_close_matches(flag, _flags(Config), n=1, cutoff=0.5)
    hint = f"; the nearest is {near[0]}" if near else ""
    return f"unknown argument {flag}{hint}; --help lists all"


def _flags(config: type, prefix: str = "--") -> list[str]:
    """Every flag of a config and its sections."""
    names = []
    for name, field in config.__dataclass_fields__.items():
        names.append(prefix + name)
        if isinstance(field.default_factory, type):
            names += _flags(field.default_factory, f"{prefix}{name}.")
    return names


def _reason(box: str) -> str:
    """The message inside tyro's frame, on one line."""
    lines = [line.strip("│ \n") for line in box.splitlines() if line.startswith("│")]
    message: list[str] = []
    for line in lines:
        if not line or line.startswith("──"):
            break
        message.append(line)
    return " ".join(message).removeprefix("Error parsing Config: ")


def _set_up_jax() -> None:
    # jax takes 75% of a GPU's memory by default; a training run has the GPU to itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if jax.default_backend() == "gpu" and jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "internlm2-jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _fail(error: object, status: int) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
