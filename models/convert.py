"""`python -m models.convert SRC DST`: convert weights between HF, orbax and training runs.

The type of SRC decides. A HF directory becomes an orbax directory, which loads directly onto any
mesh: config.json, params/ in the stored dtype, and the sidecar files. An orbax directory, or a
checkpoint of a training run, becomes a HF directory.
"""

import contextlib
import dataclasses
import logging
import math
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from models.byte_tokenizer import ByteTokenizer
from models.cli import fail, interruptible, parse
from models.config import ModelConfig
from models.files import read_json, write_json
from models.weights import sidecar_files
from models.weights.adapter_files import is_adapter, load_adapter, merge_parameters, save_adapter
from models.weights.llama import layout_of
from models.weights.load import check_loadable, hf_parameters
from models.weights.memory import check_memory
from models.weights.orbax_checkpoint import is_orbax, orbax_parameters, save_orbax
from models.weights.orbax_errors import quiet_orbax
from models.weights.run_layout import find_checkpoint
from models.weights.save import MAX_SHARD_BYTES, write_hf
from models.weights.train_checkpoint import find_run, read_checkpoint

_SYNONYMS = {  # of an older version, and of Hugging Face and its tools
    name: hint
    for hint, names in {
        "take --assets_from": "beside tokenizer tokenizer_path",
        "take --merge": "base base_model base_model_name_or_path",
        "take --dtype": "torch_dtype",
        "take --max_shard_gb": "max_shard_size shard_size",
        "name the directory as DST": "out output output_dir save_dir",
    }.items()
    for name in names.split()
}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    layout: str | None = None,
    assets_from: str | Path | None = None,
    merge: str | Path | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> str:
    """Convert a checkpoint; the destination is complete or absent.

    Args:
      source: HF InternLM2 directory, orbax directory, or a training run or one of its checkpoints.
        A run with LoRA adapters becomes a PEFT directory, or with `merge` whole HF weights.
      destination: directory to create; must not exist. Its parents are created.
      layout: layout of a HF destination, see `save_hf`. With a layout, a HF source becomes HF
        again. None: orbax for a HF source, else the layout of a run's exports, else that of
        assets_from.
      assets_from: directory whose tokenizer, code and other files are copied; None: source.
      merge: base model, a HF directory or a run, whose weights the adapters of a run, or of a PEFT
        directory, are added to; the tokenizer and code of a HF directory are copied.
      progress: show progress bars.
      **kwargs: dtype and max_shard_bytes of `save_hf`, for a HF destination.

    Returns:
      A remark on the tokenizer of the destination, or "".

    Raises:
      FileExistsError: the destination exists, or another process is writing it.
      FileNotFoundError, ValueError: as for `load_hf`, `load_orbax` and `save_hf`; or the tokenizer
        in assets_from is not the tokenizer of the run.
      OSError: a file cannot be written, for example because the disk is full.
      MemoryError: the host has less free memory than the conversion needs.

    Memory: on the host three times the largest parameter, all layers (`models.weights.memory`).
    """
    source, destination = Path(source), Path(destination)
    if destination.exists():  # before minutes of reading
        raise FileExistsError(f"{destination} exists: choose another name or remove it")
    if assets_from is not None and (str(assets_from) == "" or not Path(assets_from).is_dir()):
        raise FileNotFoundError(f"--assets_from={str(assets_from)!r} is not a directory")
    found, remark = find_checkpoint(source), ""
    if merge is not None or is_adapter(source) or (found and read_checkpoint(found).lora):
        base = None if merge is None else Path(merge)
        return _convert_adapter(
            source,
            found,
            destination,
            base,
            layout=layout,
            assets_from=base if assets_from is None else Path(assets_from),
            progress=progress,
            **kwargs,
        )
    if found is None:
        check_loadable(source)
    assets_from = Path(assets_from) if assets_from is not None else None if found else source
    to_orbax = layout is None and found is None and not is_orbax(source)
    if to_orbax and kwargs.get("dtype") is not None:
        raise ValueError(
            f"--dtype={kwargs['dtype']}: orbax keeps the stored dtype; add --layout to write HF "
            "weights"
        )
    # The host has more memory, and a conversion computes nothing.
    with jax.default_device(jax.local_devices(backend="cpu")[0]), quiet_orbax():
        if found is not None:
            checkpoint = read_checkpoint(found)
            config, stored, parameters = checkpoint.config, "float32", checkpoint.parameters()
            if assets_from is not None:
                sidecar_files.check_tokenizer(checkpoint.tokenizer, assets_from)
            else:
                remark = _without_tokenizer(checkpoint.tokenizer, destination)
        elif is_orbax(source):
            config, stored, parameters = orbax_parameters(source)
        else:
            # One bar: for reading if everything is read at first, else for writing.
            config, stored, parameters = hf_parameters(source, progress=progress and to_orbax)
        check_memory(config, stored)
        with contextlib.closing(parameters):  # an error ends the progress bar, too
            if to_orbax:
                assert assets_from is not None  # the source, if no other
                _write_orbax(config, stored, parameters, assets_from, destination)
            else:
                kwargs["dtype"] = kwargs.get("dtype") or stored
                write_hf(
                    config,
                    parameters,
                    destination,
                    assets_from=assets_from,
                    layout=layout or layout_of(found, assets_from),
                    progress=progress,
                    **kwargs,
                )
    return remark


def _convert_adapter(
    source: Path,
    found: Path | None,
    destination: Path,
    base: Path | None,
    *,
    layout: str | None,
    assets_from: Path | None,
    progress: bool,
    dtype: str | None = None,
    **kwargs: Any,
) -> str:
    """Write the adapters of a run as a PEFT directory, or merge adapters into their base."""
    base_run = None if base is None else find_run(base)
    if base_run is not None:
        assets_from = None if assets_from == base else assets_from
    elif base is not None:
        check_loadable(base)
    with jax.default_device(jax.local_devices(backend="cpu")[0]), quiet_orbax():
        if found is not None:
            checkpoint = read_checkpoint(found)
            if checkpoint.lora is None:
                raise ValueError(f"--merge: {found} has whole weights, and no adapters to merge")
            config, lora, params = checkpoint.config, checkpoint.lora, checkpoint.adapter()
            if base is None:
                named = checkpoint.base or "internlm2"
                layout = layout or layout_of(found, Path(named))
                save_adapter(destination, config, lora, params, base=named, layout=layout)
                return f", a PEFT adapter; --merge BASE_DIR writes whole weights (base: {named})"
        elif base is None:
            raise ValueError(f"{source} is a LoRA adapter: add --merge BASE_DIR, its base model")
        else:
            hf = base / "config.json"
            config = base_run.config if base_run else ModelConfig.from_hf(read_json(hf))
            lora, params = load_adapter(source, config)
        if base_run is not None:
            of_base, stored, parameters = base_run.config, "float32", base_run.parameters()
        else:
            of_base, stored, parameters = hf_parameters(base, progress=False)
        if changed := config.differences(of_base):
            raise ValueError(
                f"--merge={base} is another base model: {', '.join(changed)} differ from the run's"
            )
        check_memory(config, stored)
        with contextlib.closing(parameters):
            write_hf(
                config,
                merge_parameters(parameters, lora, params),
                destination,
                dtype=dtype or stored,
                assets_from=assets_from,
                layout=layout or layout_of(base),
                progress=progress,
                **kwargs,
            )
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert InternLM2 weights between HF, orbax and training runs.

    A HF directory (config.json, and safetensors or pytorch_model*.bin) becomes an orbax directory,
    which loads directly onto any mesh. An orbax directory, or a training run, becomes a HF
    directory with safetensors.
    """

    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """HF directory, orbax directory, or training run."""

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Directory to create; must not exist."""

    layout: Annotated[
        Literal["internlm2", "llama"] | None, tyro.conf.arg(metavar="internlm2|llama")
    ] = None
    """Write HF weights in this layout; llama: wqkv split, names of LlamaForCausalLM. By default
    that of the exports of a run, or of the base model, or of --assets_from, else internlm2."""

    assets_from: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """HF directory whose tokenizer, code and other files are copied. By default SRC; a training run
    has none of these files."""

    merge: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Base model, a HF directory or a run: add the LoRA adapters of SRC, a run or a PEFT directory,
    to its weights."""

    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        tyro.conf.arg(metavar="float32|bfloat16|float16"),
    ] = None
    """Dtype of the HF weights. By default the stored dtype."""

    max_shard_gb: float = MAX_SHARD_BYTES / 1e9
    """Largest HF file in GB (10^9 bytes)."""

    def __post_init__(self):
        """Check the size of a file.

        Raises:
          ValueError: it is not above 0 and finite.
        """
        if not 1 <= self.max_shard_gb * 1e9 < math.inf:
            raise ValueError(f"--max_shard_gb={self.max_shard_gb} must be above 0 and finite")


@interruptible
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0; 1 for an error; 2 for wrong flags."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        config = parse(
            ConvertConfig,
            sys.argv[1:] if argv is None else argv,
            "models.convert",
            synonyms=_SYNONYMS,
        )
    except ValueError as error:
        return fail(error, 2)
    try:
        with _exit_on_signal():
            remark = convert(
                config.src,
                config.dst,
                layout=config.layout,
                assets_from=config.assets_from,
                merge=config.merge,
                dtype=config.dtype,
                max_shard_bytes=int(config.max_shard_gb * 1e9),
                progress=sys.stderr.isatty(),
            )
    except (ValueError, OSError, MemoryError) as error:
        return fail(error, 1)
    print(f"wrote {config.dst}{remark}")
    return 0


@contextlib.contextmanager
def _exit_on_signal() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGINT, so that a partial destination is removed."""

    def stop(signum, _):
        sys.exit(128 + signum)

    previous = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _without_tokenizer(fingerprint: str | None, destination: Path) -> str:
    """Return a remark for weights of a run that are written without a tokenizer."""
    if fingerprint == ByteTokenizer.fingerprint:
        return (
            f"; the run was trained on bytes: python -m models.generate {destination} "
            "--tokenizer=byte"
        )
    return ", without a tokenizer: --assets_from HF_DIR copies the tokenizer of the run"


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
        layout = layout_of(assets_from)
        hf = sidecar_files.sidecar_config(assets_from, config, dtype=dtype, layout=layout)
        write_json(partial / sidecar_files.CONFIG, hf)


if __name__ == "__main__":
    sys.exit(main())
