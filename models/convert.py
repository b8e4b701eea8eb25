"""python -m models.convert SRC DST: a HF InternLM2 directory becomes an orbax checkpoint.

DST holds config.json, params/ (orbax, in the types they are stored in) and the tokenizer files of
SRC; `models.load` reads it.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from models.hf_files import HFDirectory
from models.load import load_hf, save_orbax

# What lies beside the weights and is needed to use them.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def convert(source: str | Path, destination: str | Path) -> None:
    """Converts a HF directory; the destination is complete or absent.

    Args:
      source: HF InternLM2 directory.
      destination: must not exist; its parent is created.

    Raises:
      FileExistsError: the destination exists.
      FileNotFoundError, ValueError: as `load_hf`.
      OSError: the disk is full, or refuses.
    """
    source, destination = Path(source), Path(destination)
    with new_directory(destination) as partial:
        # The host's memory is the larger one, and a conversion computes nothing.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            save_orbax(load_hf(source, dtype=_stored_dtype(source)), partial)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)


@contextlib.contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A directory to fill, which appears under its name only once the block has succeeded.

    Raises:
      FileExistsError: there is something of that name.
    """
    if destination.exists():
        raise FileExistsError(f"{destination} exists: choose another name or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        os.rename(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m models.convert",
        description="Convert a HF InternLM2 checkpoint (config.json and safetensors) to an orbax "
        "checkpoint that loads straight onto any mesh.",
    )
    parser.add_argument("src", metavar="SRC", help="HF directory")
    parser.add_argument("dst", metavar="DST", help="directory to create; must not exist")
    args = parser.parse_args(argv)
    try:
        convert(args.src, args.dst)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.dst}")
    return 0


def _stored_dtype(source: Path) -> str:
    """The widest type among the tensors, so that none is rounded."""
    types = set(HFDirectory(source).dtypes.values())
    return types.pop() if len(types) == 1 else "float32"


if __name__ == "__main__":
    sys.exit(main())
