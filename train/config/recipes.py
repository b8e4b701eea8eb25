"""Named configurations, each flag of which can be overridden.

They are XTuner's for InternLM2, with its hyperparameters. What is different here: documents packed
into a row never see each other; a loss is the mean over the tokens of the whole step; rows of one
step are computed together where memory allows (XTuner accumulates single rows: the same step); the
warm-up begins at the rate of its first step instead of a fortieth, or a 1e-5th, of the peak.

References:
    InternLM/xtuner v0.1.23, xtuner/configs/internlm: internlm2_7b_full_finetune_custom_dataset_e1,
    internlm2_chat_1_8b_full_alpaca_e3.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from models.config import PRESETS
from train.config.config import Config
from train.config.sections import OptimConfig

PROMPTS = ("请给我介绍五个上海的景点", "Please tell me five scenic spots in Shanghai")
"""XTuner's, for samples while training."""


def _full_32k(model: str) -> Config:
    """One epoch of long rows; a row a device and step."""
    return Config(
        model=model,
        seq_len=32_768,
        epochs=1.0,
        optim=OptimConfig(
            lr=4e-5, betas=(0.9, 0.95), weight_decay=0.01, warmup_ratio=0.025, min_lr_ratio=0.15
        ),
        prompts=PROMPTS,
        sample_every=500,
        chat=True,
    )


def _full_alpaca(model: str) -> Config:
    """Three epochs of Alpaca in rows of 2,048; 16 rows a device and step."""
    return Config(
        model=model,
        seq_len=2_048,
        epochs=3.0,
        optim=OptimConfig(
            lr=2e-5, betas=(0.9, 0.999), weight_decay=0.0, warmup_ratio=0.03, min_lr_ratio=0.0
        ),
        log_every=10,
        prompts=PROMPTS,
        sample_every=500,
        chat=True,
    )


_SIZES = ("internlm2-1.8b", "internlm2-7b", "internlm2-20b")
RECIPES = {f"{size}-full-32k": _full_32k(size) for size in _SIZES}
RECIPES |= {f"{size}-full-alpaca-2k": _full_alpaca(size) for size in _SIZES}


def find_recipe(argv: Sequence[str]) -> Config:
    """The configuration that the flags override.

    Args:
        argv: what was typed.

    Raises:
        ValueError: no such recipe, or --steps and --epochs together.
    """
    steps, epochs = _given(argv, "steps"), _given(argv, "epochs")
    if steps is not None and epochs is not None:
        raise ValueError(f"--steps={steps} and --epochs={epochs} contradict: leave one out")
    name = _given(argv, "recipe")
    if name is None or name == "list":
        return Config()
    if name not in RECIPES:
        raise ValueError(f"--recipe={name} must be one of {', '.join(RECIPES)}, or list")
    recipe = RECIPES[name]
    return recipe if steps is None else dataclasses.replace(recipe, epochs=None)


def check_recipe(config: Config) -> None:
    """Checks that a recipe got the data that it is for, and weights that know a tokenizer.

    Raises:
        ValueError: one is missing.
    """
    if config.recipe is None or config.dry_run:
        return
    if not config.data.files:
        raise ValueError(f"--recipe={config.recipe} needs --data: files to train on")
    if config.model in PRESETS and config.tokenizer is None:
        raise ValueError(
            f"--recipe={config.recipe} needs --model DIR, trained weights: --model={config.model} "
            "begins with random ones, for which --tokenizer must say what they learn to read"
        )


def recipe_list() -> str:
    """A line for each recipe."""
    return "\n".join(
        f"{name:<32} rows of {c.seq_len:>6,} tokens, {c.epochs:g} epoch{'s' * (c.epochs != 1)}, "
        f"learning rate {c.optim.lr:g}, betas {c.optim.rates}, "
        f"weight decay {c.optim.weight_decay:g}"
        for name, c in RECIPES.items()
    )


def _given(argv: Sequence[str], flag: str) -> str | None:
    """The value that a flag was given, the last one counting."""
    value = None
    for here, following in itertools.pairwise([*argv, ""]):
        name, equals, after = here.partition("=")
        if name == f"--{flag}":
            value = after if equals else following
    return value
