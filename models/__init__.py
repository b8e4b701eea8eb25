"""InternLM2 in Flax: architecture, weights, tokenizer, generation."""

from models.config import PRESETS, ModelConfig
from models.internlm2 import InternLM2, init
from models.weights.load import load, load_hf
from models.weights.save import save_hf

__all__ = ["PRESETS", "InternLM2", "ModelConfig", "init", "load", "load_hf", "save_hf"]
