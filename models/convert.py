"""python -m models.convert SRC DST: HF weights to an orbax checkpoint, or back.

What SRC is decides: a HF directory becomes an orbax one, which loads straight onto any mesh
(config.json, params/ in the type they are stored in, and what else lay beside the weights);
an orbax one, or the checkpoint of a training run, becomes HF.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from models.config import ModelConfig
from models.weights import sidecar_files
from models.weights.load import hf_parameters
from models.weights.memory import check_memory
from models.weights.orbax_checkpoint import converted_parameters, is_converted, save_orbax
from models.weights.safetensors_file import DTYPES
from models.weights.save import LAYOUTS, MAX_SHARD_BYTES, write_hf
from models.weights.train_checkpoint import find_checkpoint, trained_parameters


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    layout: str | None = None,
    assets_from: str | Path | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> None:
    """Converts a checkpoint; the destination is complete or absent.

    Args:
      source: HF InternLM2 directory, directory that this made, or a training run's directory or
        one of its checkpoints.
      destination: must not exist; its parent is created.
      layout: of a HF destination, see `save_hf`; given one, a HF source becomes HF again. None:
        orbax of a HF source, else "internlm2".
      assets_from: directory whose tokenizer, code and other files go along; None: source.
      progress: show progress bars.
      **kwargs: dtype and max_shard_bytes of `save_hf`, for a HF destination.

    Raises:
      FileExistsError: the destination exists.
      FileNotFoundError, ValueError: as `load_hf`, `load_orbax`, `save_hf`.
      OSError: the disk is full, or refuses.
      MemoryError: this machine has less memory than that, before anything is written.

    Memory: on the host three times the largest parameter of all layers (`models.weights.memory`).
    """
    source, destination = Path(source), Path(destination)
    if destination.exists():  # before minutes of reading
        raise FileExistsError(f"{destination} exists: choose another name or remove it")
    checkpoint = find_checkpoint(source)
    if assets_from is not None and (str(assets_from) == "" or not Path(assets_from).is_dir()):
        raise FileNotFoundError(f"assets_from={str(assets_from)!r} is not a directory")
    assets_from = Path(assets_from) if assets_from is not None else None if checkpoint else source
    # The host's memory is the larger one, and a conversion computes nothing.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if checkpoint is not None:
            config, stored, parameters = trained_parameters(checkpoint)
        elif is_converted(source):
            config, stored, parameters = converted_parameters(source)
        else:
            if layout is None and kwargs.get("dtype") is not None:
                raise ValueError(
                    f"dtype={kwargs['dtype']}: orbax keeps the stored type; add a layout to write "
                    "HF weights"
                )
            # One bar is enough: of what is read where that is all, else of what is written.
            config, stored, parameters = hf_parameters(source, progress=progress and not layout)
        check_memory(config, stored)
        if layout is None and checkpoint is None and not is_converted(source):
            assert assets_from is not None  # source, if nothing else
            return _write_orbax(config, stored, parameters, assets_from, destination)
        kwargs["dtype"] = kwargs.get("dtype") or stored
        layout = layout or "internlm2"
        write_hf(
            config,
            parameters,
            destination,
            assets_from=assets_from,
            layout=layout,
            progress=progress,
            **kwargs,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m models.convert",
        description="Convert a HF InternLM2 checkpoint (config.json, and safetensors or "
        "pytorch_model*.bin) to an orbax checkpoint that loads straight onto any mesh; or an "
        "orbax checkpoint, or a training run, to HF safetensors. What SRC is decides.",
    )
    parser.add_argument("src", metavar="SRC", help="HF directory, orbax directory, or training run")
    parser.add_argument("dst", metavar="DST", help="directory to create; must not exist")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="write HF weights, with these names; llama: un-fused, for LlamaForCausalLM",
    )
    parser.add_argument(
        "--assets_from",
        metavar="DIR",
        help="HF directory whose tokenizer and code go along (default: SRC; a training run has "
        "neither)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES.values(), help="type of HF weights (default: as stored)"
    )
    parser.add_argument(
        "--max_shard_gb",
        type=_gigabytes,
        default=MAX_SHARD_BYTES,
        metavar="GB",
        help=f"largest HF file (default: {MAX_SHARD_BYTES / 1e9:g})",
    )
    args = parser.parse_args(argv)
    try:
        convert(
            args.src,
            args.dst,
            layout=args.layout,
            assets_from=args.assets_from,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_gb,
            progress=True,
        )
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.dst}")
    return 0


def _gigabytes(text: str) -> int:
    """Bytes."""
    size = float(text) * 1e9
    if not 1 <= size < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and finite")
    return int(size)


def _write_orbax(
    config: ModelConfig,
    dtype: str,
    parameters: Iterable[tuple[str, jax.Array]],
    assets_from: Path,
    destination: Path,
) -> None:
    with sidecar_files.new_directory(destination) as partial:
        save_orbax(parameters, partial)
        sidecar_files.copy_sidecar_files(assets_from, partial)
        hf = sidecar_files.sidecar_config(assets_from, config, dtype=dtype)
        sidecar_files.write_json(partial / sidecar_files.CONFIG, hf)


if __name__ == "__main__":
    sys.exit(main())
