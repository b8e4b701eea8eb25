"""Read and check the inputs of a run: architecture, tokenizer, data files, prompts."""

import dataclasses
import math
from pathlib import Path

from models.config import PRESETS, ModelConfig, RopeScaling
from models.files import read_json
from models.lora import LoRA
from models.tokenizer import Tokenizer, load_tokenizer
from models.weights.adapter_files import load_adapter
from models.weights.run_layout import find_checkpoint
from train.config.sections import DataConfig, LoRAConfig
from train.data.files.readers import check_path
from train.data.pack.mixture import parse_source


def read_model(name: str) -> tuple[ModelConfig, Path | None]:
    """Return the architecture, and the directory of its weights if there is one.

    Args:
        name: --model, a preset or a directory.

    Raises:
        ValueError: There is no such preset, and no directory with a readable config.json.
    """
    if name in PRESETS:
        return PRESETS[name], None
    directory = Path(name)
    if directory.is_dir() and find_checkpoint(directory) is not None:
        raise ValueError(
            f"--model={name} is the directory of a training run: convert it first, with "
            f"python -m models.convert {name} DIR --assets_from HF_DIR, and give --model=DIR"
        )
    if not (directory / "config.json").exists():
        what = "a directory without config.json" if directory.is_dir() else "no directory"
        raise ValueError(f"--model={name} is no preset ({', '.join(PRESETS)}) and {what}")
    return ModelConfig.from_hf(read_json(directory / "config.json")), directory


def extend_rope(model: ModelConfig, factor: float | None, seq_len: int) -> ModelConfig:
    """Return the model with --rope_factor, after checking that seq_len is within its positions.

    Raises:
        ValueError: The row is longer; names the factor that extends the model.
    """
    scaling = model.rope_scaling
    if factor is not None:
        scaling = RopeScaling(type=scaling.type if scaling else "dynamic", factor=factor)
    trained = model.max_position_embeddings
    reach = int(trained * (scaling.factor if scaling else 1))
    if seq_len > reach:
        how = f"{scaling.type} scaling by {scaling.factor:g}" if scaling else "no rotary scaling"
        raise ValueError(
            f"--seq_len={seq_len} is beyond the {reach:,} positions of the model ({trained:,}, "
            f"{how}): --rope_factor={math.ceil(seq_len / trained)} extends it, or take a shorter "
            "--seq_len"
        )
    return model if factor is None else dataclasses.replace(model, rope_scaling=scaling)


def read_lora(config: LoRAConfig, model: ModelConfig) -> LoRA | None:
    """Return the adapters to train: new ones, or those of --lora.adapter; None without.

    Raises:
        ValueError, OSError: the adapter cannot be read, or belongs to another base model.
    """
    if config.adapter is None:
        return config.lora
    lora, _ = load_adapter(Path(config.adapter), model)
    return dataclasses.replace(lora, dropout=config.dropout)


def read_tokenizer(
    spec: str | None, weights: Path | None, model: ModelConfig, name: str
) -> Tokenizer:
    """Load --tokenizer, or the tokenizer beside the weights; bytes for random weights.

    Args:
        spec: --tokenizer.
        weights: Directory of the model's weights, if there is one.
        model: Architecture, for the size of its vocabulary.
        name: Name of the model.

    Raises:
        ValueError: The tokenizer is larger than the vocabulary, or the weights have none.
        OSError: The tokenizer cannot be read.
    """
    try:
        tokenizer = load_tokenizer(spec or weights or "byte")
    except FileNotFoundError as error:
        if spec is not None:
            raise
        raise ValueError(
            f"{error}: name one with --tokenizer ('byte' for a model that was trained on bytes)"
        ) from error
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than the "
            f"{model.vocab_size} of {name}: choose another --tokenizer or --model"
        )
    return tokenizer


def check_files(data: DataConfig) -> None:
    """Check that the files of --data and --data.val exist, without reading them.

    Raises:
        ValueError, OSError: A file is missing or its weight is out of bounds.
    """
    for file in (*(data.files or ()), *(() if data.hold_out else data.val or ())):
        for path in parse_source(file).files:
            check_path(path)
