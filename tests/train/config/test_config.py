"""Every value out of range is an error that names its flag."""

import pytest

from train.config.config import Config
from train.config.sections import LoRAConfig, MeshConfig, OptimConfig


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Config(seq_len=1), "--seq_len=1 must be at least 2"),
        (lambda: Config(steps=0), "--steps=0 must be at least 1"),
        (lambda: Config(seed=-1), "--seed=-1 must be at least 0"),
        (lambda: Config(batch_size=0), "--batch_size=0 must be at least 1"),
        (
            lambda: Config(batch_size=3, grad_accum=2),
            "--batch_size=3 must be a multiple of --grad_accum=2",
        ),
        (lambda: OptimConfig(lr=-1.0), "--optim.lr=-1.0 must be above 0"),
        (lambda: OptimConfig(betas=(0.9, 0.99999999)), "and at most 0.99999994"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), r"--optim.betas=\(0.9, 1.0\) must be in \[0, 1\)"),
        (lambda: OptimConfig(warmup_ratio=2.0), "--optim.warmup_ratio=2.0 must be a share"),
        (lambda: OptimConfig(clip=0.0), "--optim.clip=0.0 must be above 0"),
        (lambda: MeshConfig(tensor=0), "--mesh.tensor=0 must be at least 1"),
    ],
)
def test_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().seq_len = 3  # pyright: ignore[reportAttributeAccessIssue]  # the point


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAConfig(rank=0), "--lora.rank=0 must be at least 1"),
        (lambda: LoRAConfig(rank=4, dropout=1.0), r"--lora.dropout=1.0 must be in \[0, 1\)"),
        (lambda: LoRAConfig(alpha=8.0), "--lora.alpha needs --lora.rank, such as --lora.rank=64"),
        (lambda: LoRAConfig(adapter="a", rank=4), "--lora.rank is that of --lora.adapter"),
        (lambda: Config(base_dtype="nf4"), "--base_dtype=nf4 is the storage of frozen weights"),
        (
            lambda: Config(lora=LoRAConfig(rank=4), param_dtype="bf16"),
            "--param_dtype=bf16 is for trained weights",
        ),
        (
            lambda: Config(lora=LoRAConfig(rank=4), base_dtype="nf4", remat="none"),
            "--remat=none would keep a dequantized copy",
        ),
    ],
)
def test_adapters_that_contradict_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
