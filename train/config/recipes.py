"""Recipes: named configurations, each flag of which can be overridden.

Those of up to 32,768 tokens have the hyperparameters of XTuner's recipes for InternLM2; the longer
ones are this project's own. Differences from XTuner: attention never crosses documents that are
packed into one row; the loss is the mean over the tokens of the whole step; rows of a step are
computed together where memory allows (XTuner accumulates single rows: the same step); the warm-up
starts at the rate of its first step, not at a fortieth or a 1e-5th of the peak.

References:
    InternLM/xtuner v0.1.23, xtuner/configs/internlm: internlm2_7b_full_finetune_custom_dataset_e1,
    internlm2_chat_1_8b_full_alpaca_e3, internlm2_chat_7b_qlora_{alpaca,oasst1,oasst1_512,
    code_alpaca}_e3.
"""

from dataclasses import replace

from train.config.config import Config
from train.config.sections import LoRAConfig, OptimConfig

PROMPTS = ("请给我介绍五个上海的景点", "Please tell me five scenic spots in Shanghai")
"""Prompts of XTuner, for samples during training."""

CODE_PROMPTS = (
    "写一个Python函数，将十六进制颜色代码（如#0066ee）转换为对应的红、绿、蓝（RGB）三个颜色分量值，"
    "并以元组的形式返回。",
    "Write a Python function that takes a hexadecimal color code (e.g., #0066ee) as input and "
    "converts it into the corresponding red, green, and blue (RGB) color component values.",
)
"""Prompts of XTuner's recipe for code."""


_ALPACA = Config(
    epochs=3.0,
    optim=OptimConfig(
        lr=2e-5, betas=(0.9, 0.999), weight_decay=0.0, warmup_ratio=0.03, min_lr_ratio=0.0
    ),
    log_every=10,
    prompts=PROMPTS,
    sample_every=500,
    chat=True,
)
"""Three epochs of short chats."""


def _full_alpaca(model: str) -> Config:
    """Return full fine-tuning on rows of 2,048 tokens; 16 rows a device and step."""
    return replace(_ALPACA, model=model, seq_len=2_048)


def _qlora(
    model: str, seq_len: int, prompts: tuple[str, ...] = PROMPTS, sample_every: int = 500
) -> Config:
    """Return QLoRA: NF4, adapters of rank 64 on all linear layers."""
    return replace(
        _ALPACA,
        model=model,
        seq_len=seq_len,
        lora=LoRAConfig(rank=64, alpha=16.0, dropout=0.1),
        base_dtype="nf4",
        optim=replace(_ALPACA.optim, lr=2e-4),
        prompts=prompts,
        sample_every=sample_every,
    )


def _full_32k(model: str) -> Config:
    """Return one epoch of rows of 32,768 tokens; one row a device and step."""
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


def _full_long(model: str, seq_len: int) -> Config:
    """Return one epoch of longer rows, after a model that was trained on rows of 32,768 tokens.

    For one GPU of 141 GB: bfloat16 weights and int8 moments. Extension of a trained model takes few
    tokens, at a low rate that stays constant after the warm-up.
    """
    return Config(
        model=model,
        seq_len=seq_len,
        rope_factor=seq_len / 32_768,
        epochs=1.0,
        param_dtype="bf16",
        optim=OptimConfig(
            lr=1e-5,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            warmup_ratio=0.05,
            schedule="constant",
            moment_dtype="int8",
        ),
    )


_SIZES = ("internlm2-1.8b", "internlm2-7b", "internlm2-20b")
RECIPES = {f"{size}-full-32k": _full_32k(size) for size in _SIZES}
RECIPES |= {
    f"{size}-full-{tokens // 1024}k": _full_long(size, tokens)
    for size in _SIZES[:2]
    for tokens in (131_072, 262_144)
}
RECIPES |= {f"{size}-full-alpaca-2k": _full_alpaca(size) for size in _SIZES}
RECIPES |= {f"{size}-qlora-alpaca-2k": _qlora(size, 2_048) for size in _SIZES}
RECIPES |= {f"{size}-qlora-oasst-2k": _qlora(size, 2_048) for size in _SIZES}
RECIPES |= {f"{size}-qlora-oasst-512": _qlora(size, 512) for size in _SIZES}
RECIPES |= {f"{size}-qlora-code-2k": _qlora(size, 2_048, CODE_PROMPTS, 100) for size in _SIZES}


def recipe_list() -> str:
    """Return one line for each recipe."""
    return "\n".join(
        f"{name:<32} rows of {c.seq_len:>6,} tokens, {c.epochs:g} epoch{'s' * (c.epochs != 1)}, "
        f"learning rate {c.optim.lr:g}, betas {c.optim.rates}, "
        f"weight decay {c.optim.weight_decay:g}"
        for name, c in RECIPES.items()
    )
