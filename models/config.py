"""The architecture of an InternLM2 model, and nothing about how it is run.

`ModelConfig.from_hf` reads a HF config.json as transformers 4 and 5 write it; `PRESETS` holds the
released sizes and one that trains on a laptop.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from models.rope_scaling import RopeScaling, rope_from_hf

# What the original's configuration class assumes when config.json has no such key. No released
# checkpoint relies on them (all of them differ from the released values), but a key left out
# means exactly this. Source: InternLM2 configuration_internlm2.py, InternLM2Config.__init__.
HF_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as query heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "bias": True,
}


NO_ID = -1
"""In place of a token that a model does not have."""
NAMES = {int: "a whole number", float: "a finite number", bool: "true or false"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of an InternLM2 model. Defaults are those of all releases.

    Attributes:
      vocab_size: rows of the embedding (V).
      hidden_size: width of the residual stream (D); a multiple of num_heads.
      num_layers: blocks (L).
      num_heads: query heads (N); a multiple of num_kv_heads.
      num_kv_heads: key/value heads (K).
      intermediate_size: width of the feed-forward layer (F).
      rms_norm_eps: added to the mean square.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None: plain rotary embedding at every length.
      max_position_embeddings: tokens; beyond it dynamic scaling changes the base.
      bias: biases in wqkv and wo (the feed-forward layer and the output never have any).
      tie_word_embeddings: the output matrix is the embedding.
      pad_token_id: row of the embedding that gets no gradient, see `models.internlm2`; or NO_ID.
      bos_token_id: begins a text; or NO_ID.
      eos_token_id: ends a document; or NO_ID.
      initializer_range: standard deviation of random weights.

    Raises:
      ValueError: a size is not positive, or heads do not divide.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int = 2
    bos_token_id: int = 1
    eos_token_id: int = 2
    initializer_range: float = 0.02

    def __post_init__(self):
        for field in (
            "vocab_size hidden_size num_layers num_heads num_kv_heads intermediate_size "
            "max_position_embeddings rope_theta rms_norm_eps"
        ).split():
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} (hidden_size / num_heads) must be even: "
                "rotary embedding turns pairs"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head (H)."""
        return self.hidden_size // self.num_heads

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (G)."""
        return self.num_heads // self.num_kv_heads

    def num_params(self) -> int:
        """Parameters, each counted once (a tied output matrix is the embedding)."""
        D, F, H, L = self.hidden_size, self.intermediate_size, self.head_dim, self.num_layers
        wqkv_width = (self.num_heads + 2 * self.num_kv_heads) * H
        layer = D * wqkv_width + D * D + 3 * D * F + 2 * D
        if self.bias:
            layer += wqkv_width + D
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * D + L * layer + D

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a HF config.json.

        Both spellings are known: rope_scaling beside rope_theta (transformers 4) and
        rope_parameters holding both (transformers 5). A missing key means the default of the
        original's configuration class, `HF_DEFAULTS`, not a released value. The stored weight
        type (torch_dtype, dtype) is not architecture: the tensors themselves say what they are.

        Args:
          hf: parsed JSON.

        Returns:
          The configuration. Of a list of eos ids it keeps the first; the list stops generation,
          see `models.generate.stop_ids_of`.

        Raises:
          ValueError: another model_type or activation, or a value the original refuses too.
        """
        if (found := hf.get("model_type")) != "internlm2":
            raise ValueError(f"model_type={found!r} in config.json must be 'internlm2'")
        value = {**HF_DEFAULTS, **hf}
        if value["hidden_act"] != "silu":
            raise ValueError(f"hidden_act={value['hidden_act']!r} must be 'silu'")
        eos = value["eos_token_id"]
        eos = next(iter(eos), None) if isinstance(eos, list) else eos
        theta, scaling = rope_from_hf(hf)
        heads = value["num_attention_heads"]
        kv_heads = value["num_key_value_heads"]
        fields = dict(
            vocab_size=value["vocab_size"],
            hidden_size=value["hidden_size"],
            num_layers=value["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            intermediate_size=value["intermediate_size"],
            rms_norm_eps=value["rms_norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=value["max_position_embeddings"],
            bias=value["bias"],
            tie_word_embeddings=value["tie_word_embeddings"],
            pad_token_id=_id(value["pad_token_id"]),
            bos_token_id=_id(value["bos_token_id"]),
            eos_token_id=_id(eos),
            initializer_range=value["initializer_range"],
        )
        for field in dataclasses.fields(cls):
            fields[field.name] = _checked(field.name, fields[field.name], field.type)
        return cls(**fields)

    def to_hf(self, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """Contents of a config.json as the released checkpoints have it (transformers 4 keys).

        Args:
          dtype: type of the stored weights, written as torch_dtype.

        Returns:
          JSON-able dict; `from_hf` of it gives this configuration back.
        """
        scaling = self.rope_scaling
        return {
            "architectures": ["InternLM2ForCausalLM"],
            "attn_implementation": "eager",
            "auto_map": {
                "AutoConfig": "configuration_internlm2.InternLM2Config",
                "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
                "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            },
            "bias": self.bias,
            "bos_token_id": _null(self.bos_token_id),
            "eos_token_id": _null(self.eos_token_id),
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "internlm2",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "pad_token_id": _null(self.pad_token_id),
            "rms_norm_eps": self.rms_norm_eps,
            # The original accepts a float factor only, never an int.
            "rope_scaling": scaling and {"type": scaling.type, "factor": float(scaling.factor)},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


def _checked(name: str, value: Any, kind: Any) -> Any:
    """A field's value from JSON; raises ValueError where it is of another type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        int: number and isinstance(value, int),
        float: number and math.isfinite(value),
        bool: isinstance(value, bool),
    }
    if not right.get(kind, True):
        raise ValueError(f"{name}={value!r} in config.json must be {NAMES[kind]}")
    return float(value) if kind is float else value


def _id(value: Any) -> Any:
    """HF's null as NO_ID."""
    return NO_ID if value is None else value


def _null(token_id: int) -> int | None:
    """The inverse of `_id`."""
    return None if token_id == NO_ID else token_id


def _dynamic(factor: float) -> RopeScaling:
    return RopeScaling(type="dynamic", factor=factor)


PRESETS: Mapping[str, ModelConfig] = {
    # 3.3 million parameters for CPU. 320 rows hold the byte tokenizer's 265 ids and divide by 64.
    "nano": ModelConfig(
        vocab_size=320,
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=768,
        rope_scaling=_dynamic(2.0),
    ),
    "internlm2-1.8b": ModelConfig(
        vocab_size=92544,
        hidden_size=2048,
        num_layers=24,
        num_heads=16,
        num_kv_heads=8,
        intermediate_size=8192,
        rope_scaling=_dynamic(2.0),
    ),
    "internlm2-7b": ModelConfig(
        vocab_size=92544,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14336,
        rope_scaling=_dynamic(2.0),
    ),
    "internlm2-20b": ModelConfig(
        vocab_size=92544,
        hidden_size=6144,
        num_layers=48,
        num_heads=48,
        num_kv_heads=8,
        intermediate_size=16384,
        rope_scaling=_dynamic(3.0),
    ),
}
