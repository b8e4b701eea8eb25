"""python -m models.convert SRC DST: HF weights to an orbax checkpoint, or back.

What SRC is decides: a HF directory becomes an orbax one, which loads straight onto any mesh
(config.json, params/ in the type they are stored in, and what else lay beside the weights);
an orbax one, or the checkpoint of a training run, becomes HF.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from models import companions
from models.hf_files import HFDirectory, read_json
from models.internlm2 import InternLM2
from models.load import PARAMS, load_hf, load_orbax, save_orbax
from models.safetensors_file import DTYPES
from models.save import LAYOUTS, MAX_SHARD_BYTES, save_hf
from models.trained import find_checkpoint, load_trained


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    layout: str | None = None,
    beside: str | Path | None = None,
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
      beside: directory whose tokenizer, code and other files go along; None: source.
      progress: show progress bars.
      **kwargs: dtype and max_shard_bytes of `save_hf`, for a HF destination.

    Raises:
      FileExistsError: the destination exists.
      FileNotFoundError, ValueError: as `load_hf`, `load_orbax`, `save_hf`.
      OSError: the disk is full, or refuses.

    Memory: the whole model on the host, in the type it is stored in.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists():  # before minutes of reading
        raise FileExistsError(f"{destination} exists: choose another name or remove it")
    checkpoint = find_checkpoint(source)
    beside = Path(beside) if beside is not None else None if checkpoint else source
    # The host's memory is the larger one, and a conversion computes nothing.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        if checkpoint is not None:
            model = load_trained(checkpoint)
        elif (source / PARAMS).is_dir():
            stored = read_json(source / companions.CONFIG)
            model = load_orbax(source, dtype=stored.get("dtype", stored.get("torch_dtype")))
        else:
            if layout is None and kwargs.get("dtype") is not None:
                raise ValueError(
                    f"dtype={kwargs['dtype']}: orbax keeps the stored type; add a layout to write "
                    "HF weights"
                )
            model = load_hf(source, dtype=_stored_dtype(source), progress=progress)
            if layout is None:
                assert beside is not None  # source, if nothing else
                return _write_orbax(model, beside, destination)
        layout = layout or "internlm2"
        save_hf(model, destination, beside=beside, layout=layout, progress=progress, **kwargs)


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
        "--beside",
        metavar="DIR",
        help="HF directory whose tokenizer and code go along (default: SRC; a training run has "
        "neither)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES.values(), help="type of HF weights (default: as stored)"
    )
    parser.add_argument(
        "--max_shard_gb",
        type=float,
        default=MAX_SHARD_BYTES / 1e9,
        metavar="GB",
        help="largest HF file (default: %(default)g)",
    )
    args = parser.parse_args(argv)
    try:
        convert(
            args.src,
            args.dst,
            layout=args.layout,
            beside=args.beside,
            dtype=args.dtype,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            progress=True,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.dst}")
    return 0


def _write_orbax(model: InternLM2, beside: Path, destination: Path) -> None:
    dtype = str(model.embed_VD.dtype)
    with companions.new_directory(destination) as partial:
        save_orbax(model, partial)
        companions.copy_beside(beside, partial)
        hf = companions.config_beside(beside, model.config, dtype=dtype)
        companions.write_json(partial / companions.CONFIG, hf)


def _stored_dtype(source: Path) -> str:
    """The widest type among the tensors, so that none is rounded."""
    types = set(HFDirectory(source).dtypes.values())
    return types.pop() if len(types) == 1 else "float32"


if __name__ == "__main__":
    sys.exit(main())
