"""InternLM2 in Flax: architecture, weights, tokenizer, generation."""

from models.config import PRESETS, ModelConfig
from models.internlm2 import InternLM2, init

__all__ = ["PRESETS", "InternLM2", "ModelConfig", "init"]
