"""Sidecar files of weights: config, tokenizer, code, license; and atomic output directories."""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from models.byte_tokenizer import ByteTokenizer
from models.config import NO_ID, ModelConfig
from models.files import read_json
from models.tokenizer import load_tokenizer, save_fast
from models.weights import llama
from models.weights.hf_files import eos_ids

log = logging.getLogger(__name__)

CONFIG = "config.json"
GENERATION = "generation_config.json"
# Endings of files with weights, in any format, which are never copied.
WEIGHTS = (
    ".safetensors .bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .npz "
    ".safetensors.index.json .bin.index.json"
).split()
TOKENIZER = (
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json chat_template.jinja"
).split()


@contextlib.contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """Yield a directory to fill, which is renamed to `destination` once the block has succeeded.

    What an earlier process left behind when it was killed is removed first.

    Raises:
      FileExistsError: the destination exists, or another process is writing it.
    """
    if destination.exists():
        raise FileExistsError(f"{destination} exists: choose another name or remove it")
    partial = destination.parent / f".{destination.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / ".lock", blocking=False)
    try:
        with lock:
            try:
                for left in partial.iterdir():
                    if left.name != ".lock":
                        _remove(left)
                yield partial
                os.rename(partial, destination)
                (destination / ".lock").unlink(missing_ok=True)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except Timeout as error:
        raise FileExistsError(f"another process is writing {destination}") from error


def copy_sidecar_files(
    source: Path, destination: Path, *, skip: tuple[str, ...] = (CONFIG,)
) -> None:
    """Copy the files of a directory other than weights, hidden files and directories.

    Links are followed within the directory and into the blobs of the hub's cache. Other links are
    left out, with a line in the log.

    Args:
      source: a checkpoint.
      destination: an existing directory.
      skip: names, or endings that begin with a dot, of further files to leave out.
    """
    endings = (*WEIGHTS, *(s for s in skip if s[0] == "."))
    for path in sorted(source.iterdir()):
        if path.name in skip or path.name[0] == "." or path.name.endswith(endings):
            continue
        if not _stays_inside(path, source):
            log.warning(f"left out {path}: a link out of the directory, to {path.resolve()}")
        elif path.is_file():
            shutil.copyfile(path, destination / path.name)


def copy_for_llama(source: Path, destination: Path) -> None:
    """Copy the sidecar files for tools without InternLM2's own code."""
    fast = (source / "tokenizer_config.json").exists() and any(
        (source / name).exists() for name in ("tokenizer.json", "tokenizer.model")
    )
    copy_sidecar_files(source, destination, skip=(CONFIG, ".py", *(TOKENIZER if fast else ())))
    if fast:
        save_fast(source, destination)


def sidecar_config(
    source: Path | None, config: ModelConfig, *, dtype: str, layout: str = "internlm2"
) -> dict[str, Any]:
    """Return the contents of a config.json, with the keys of the source's if the models are equal.

    So keys that only transformers reads, and the names of the code, are kept. `dtype` and `layout`,
    "internlm2" or "llama", are those of the weights.
    """
    found = read_json(source / CONFIG) if source and (source / CONFIG).exists() else {}
    if found.get("model_type") == layout and ModelConfig.from_hf(found) == config:
        for name in ("rope_scaling", "rope_parameters"):
            if found.get(name) and "factor" in found[name]:  # the original refuses an integer
                found[name] = {**found[name], "factor": float(found[name]["factor"])}
        return {**found, "dtype" if "dtype" in found else "torch_dtype": dtype}
    if layout == "llama":
        return llama.hf_config(config, dtype=dtype)
    hf = config.to_hf(dtype=dtype)
    hf.pop("auto_map")  # names code that may be missing
    return hf | {key: found[key] for key in ("auto_map",) if key in found}


def generation_config(source: Path | None, config: ModelConfig) -> dict[str, Any]:
    """Return the contents of generation_config.json, with the eos ids that end a chat.

    For a chat model, whose tokenizer has a chat template, <|im_end|> is added to the eos ids:
    without it generation would never stop. Other keys of the source's file are kept.

    Raises:
      ValueError: the tokenizer of a chat model cannot be read, or an eos id is outside of the
        model's vocabulary.
    """
    found = read_json(source / GENERATION) if source and (source / GENERATION).exists() else {}
    # As in HF, generation_config.json overrides config.json.
    named = [eos_ids(source / name) for name in (GENERATION, CONFIG)] if source else []
    eos = next(filter(None, named), [i for i in (config.eos_token_id,) if i != NO_ID])
    if source and _is_chat(source) and (end := load_tokenizer(source).im_end_id) is not None:
        eos += [end] if end not in eos else []
    if outside := [i for i in eos if i >= config.vocab_size]:
        raise ValueError(
            f"eos_token_id={outside[0]} of {source or 'the model'} is outside of the model's "
            f"vocabulary of {config.vocab_size}: give the directory of the tokenizer that the "
            "model was trained with (--assets_from)"
        )
    hf = config.to_hf()
    ids = {name: hf[name] for name in ("bos_token_id", "pad_token_id")}
    return ids | found | {"eos_token_id": eos if len(eos) > 1 else next(iter(eos), None)}


def check_tokenizer(fingerprint: str | None, source: Path) -> None:
    """Check that the tokenizer in a directory is the one that a run was trained with.

    The fingerprint is that of the run's tokenizer; None: unknown, nothing is checked.

    Raises:
      ValueError: the tokenizer is another one: with it the model would read and write other text,
        and would not stop.
    """
    try:
        found = load_tokenizer(source)
    except FileNotFoundError:
        return  # no tokenizer is copied
    if fingerprint not in (None, found.fingerprint):
        remedy = "give --assets_from the directory that the run's tokenizer came from"
        if fingerprint == ByteTokenizer.fingerprint:
            remedy = "the run was trained on bytes, so leave --assets_from out"
        raise ValueError(f"the tokenizer in {source} is not the run's tokenizer: {remedy}")


def _stays_inside(path: Path, source: Path) -> bool:
    root, target = source.resolve(), path.resolve()
    # <cache>/models--owner--name/snapshots/<commit>/<file> -> ../../blobs/<hash>
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    return target.is_relative_to(root) or target.is_relative_to(blobs)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_chat(source: Path) -> bool:
    path = source / "tokenizer_config.json"
    return (source / "chat_template.jinja").exists() or (
        path.exists() and bool(read_json(path).get("chat_template"))
    )
