"""What lies beside weights: config, tokenizer, code, licence; and directories that are complete."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.tokenizer import load_tokenizer, save_fast
from models.weights.hf_files import eos_ids, read_json

CONFIG = "config.json"
GENERATION = "generation_config.json"
# Endings of files that hold weights, in any format: never carried along.
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


def copy_sidecar_files(
    source: Path, destination: Path, *, skip: tuple[str, ...] = (CONFIG,)
) -> None:
    """Copies the files of a directory that are not weights; hidden ones and directories stay.

    Args:
      source: a checkpoint.
      destination: an existing directory.
      skip: names, or endings that begin with a dot, of further files to leave.
    """
    for path in sorted(source.iterdir()):
        left = path.name in skip or path.name.endswith(tuple(s for s in skip if s[0] == "."))
        if path.is_file() and path.name[0] != "." and not path.name.endswith(tuple(WEIGHTS)):
            if not left:
                shutil.copyfile(path, destination / path.name)


def copy_for_llama(source: Path, destination: Path) -> None:
    """Copy the sidecar files for tools without InternLM2's own code."""
    fast = (source / "tokenizer_config.json").exists() and any(
        (source / name).exists() for name in ("tokenizer.json", "tokenizer.model")
    )
    copy_sidecar_files(source, destination, skip=(CONFIG, ".py", *(TOKENIZER if fast else ())))
    if fast:
        save_fast(source, destination)


def sidecar_config(source: Path | None, config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Contents of a config.json: the one that lies there, where it describes the same model.

    So its further keys, and the names of its code, survive.

    Args:
      source: a checkpoint, or None.
      config: the model's.
      dtype: of its weights.
    """
    found = read_json(source / CONFIG) if source and (source / CONFIG).exists() else {}
    if found.get("model_type") == "internlm2" and ModelConfig.from_hf(found) == config:
        return {**found, "dtype" if "dtype" in found else "torch_dtype": dtype}
    hf = config.to_hf(dtype=dtype)
    hf.pop("auto_map")  # names code, which may not be there
    return hf | {key: found[key] for key in ("auto_map",) if key in found}


def write_generation_config(source: Path | None, destination: Path, config: ModelConfig) -> None:
    """Writes generation_config.json, with <|im_end|> among the eos ids of a chat model.

    A chat model is one whose tokenizer has a chat template; without <|im_end|> it would talk on
    for ever. Keys of the file in the source are kept.

    Raises:
      ValueError: a tokenizer in the source that has a chat template cannot be read.
    """
    found = read_json(source / GENERATION) if source and (source / GENERATION).exists() else {}
    # As in HF, what generation_config.json names counts before what config.json does.
    named = [eos_ids(source / name) for name in (GENERATION, CONFIG)] if source else []
    eos = next(filter(None, named), [config.eos_token_id])
    if source and _is_chat(source) and (end := load_tokenizer(source).im_end_id) is not None:
        eos += [end] if end not in eos else []
    said = config.to_hf()
    ids = {name: said[name] for name in ("bos_token_id", "pad_token_id")}
    value = ids | found | {"eos_token_id": eos if len(eos) > 1 else eos[0]}
    write_json(destination / GENERATION, value)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file as HF does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_chat(source: Path) -> bool:
    path = source / "tokenizer_config.json"
    return (source / "chat_template.jinja").exists() or (
        path.exists() and bool(read_json(path).get("chat_template"))
    )
