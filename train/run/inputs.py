"""Read and check the inputs of a run: architecture, tokenizer, data files, prompts."""

import dataclasses
import math
from pathlib import Path

from models.byte_tokenizer import BYTE
from models.config import PRESETS, ModelConfig, RopeScaling
from models.files import read_json
from models.lora import LoRA
from models.tokenizer import Tokenizer, load_given_or
from models.weights.load import check_loadable
from models.weights.train_checkpoint import find_run, read_adapter
from train.config.sections import DataConfig, LoRAConfig
from train.data.files.readers import check_path
from train.data.pack.mixture import parse_source


def read_model(name: str) -> tuple[ModelConfig, Path | None]:
    """Return the architecture, and the directory of its weights if there is one.

    Args:
        name: --model: a preset, a config.json, a directory of HF or orbax weights, a training run
            or one of its checkpoints. The weights of a run are those of its latest checkpoint.

    Raises:
        ValueError: There is no such preset or path, or it has no readable architecture; it is a
            LoRA adapter; or the run has adapters, whose base model must be named.
    """
    if name in PRESETS:
        return PRESETS[name], None
    path = Path(name)
    if path.is_file() and path.suffix == ".json":
        return ModelConfig.from_hf(read_json(path)), None
    run = find_run(path)
    if run is not None:
        if run.lora is not None:
            raise ValueError(
                f"--model={name} is a run with adapters: to train them on, take --model={run.base} "
                f"--lora.adapter={name}; to begin from the merged weights, first python -m "
                f"models.convert {name} DIR --merge {run.base}"
            )
        return run.config, run.path
    check_loadable(path)
    if not (path / "config.json").exists():
        raise ValueError(f"--model={name} is no preset ({', '.join(PRESETS)}) and {_missing(path)}")
    return ModelConfig.from_hf(read_json(path / "config.json")), path


def _missing(path: Path) -> str:
    """Say why a path is no model."""
    if path.is_dir():
        return "a directory without config.json"
    of_hub = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
    hint = f": hf download {path} --local-dir {path} gets it from the hub" if of_hub else ""
    return f"no directory{hint}"


def default_tokenizer(model: str, weights: Path | None) -> str:
    """Return the --tokenizer that a model has by itself: "byte" for random weights.

    Args:
        model: --model.
        weights: Directory of the model's weights, if there is one.
    """
    if weights is not None:
        run = find_run(weights)
        return run and run.tokenizer_spec or str(weights)
    beside = Path(model).parent
    files = ("tokenizer.json", "tokenizer.model")
    own = model not in PRESETS and any((beside / file).exists() for file in files)
    return str(beside) if own else BYTE


def with_vocabulary(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return a small model with rows of the embedding for each token, a multiple of 64."""
    return dataclasses.replace(model, vocab_size=-(-tokenizer.vocab_size // 64) * 64)


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
    lora, _ = read_adapter(Path(config.adapter), model)
    return dataclasses.replace(lora, dropout=config.dropout)


def read_tokenizer(spec: str | None, weights: Path | None, model: str) -> Tokenizer:
    """Load --tokenizer, or the tokenizer of the model.

    Args:
        spec: --tokenizer.
        weights: Directory of the model's weights, if there is one.
        model: --model.

    Raises:
        ValueError: The weights have no tokenizer.
        OSError: The tokenizer cannot be read.
    """
    return load_given_or(spec, default_tokenizer(model, weights))


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig, name: str) -> None:
    """Check that the model has a row of the embedding for every token.

    Raises:
        ValueError: The tokenizer is larger.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, more than the "
            f"{model.vocab_size} of {name}: choose another --tokenizer or --model"
        )


def check_files(data: DataConfig) -> None:
    """Check that the files of --data and --data.val exist, without reading them.

    Raises:
        ValueError, OSError: A file is missing or its weight is out of bounds.
    """
    for file in (*(data.files or ()), *(() if data.hold_out else data.val or ())):
        for path in parse_source(file).files:
            check_path(path)
