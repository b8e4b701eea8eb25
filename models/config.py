"""Architecture of an InternLM2 model: `ModelConfig`, and `PRESETS` of the released sizes.

`ModelConfig.from_hf` reads a HF config.json as transformers 4 and 5 write it. Options that do not
change the architecture are in `models.execution`.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from models.llama_config import from_llama
from models.rope_scaling import RopeScaling, rope_from_hf

# Defaults of the original for keys that config.json lacks. Many differ from the released values;
# no released checkpoint relies on them. Source: InternLM2 configuration_internlm2.py,
# InternLM2Config.__init__.
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
    "rope_theta": 10000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "bias": True,
}


NO_ID = -1
"""Id of a special token that a model does not have; null in config.json."""

_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
_TYPE_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false"}
# Upper bounds, far above every model that exists: they refuse a damaged config.json before a loop
# over 10^9 layers, or an array that no machine can hold.
_BOUNDS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "num_layers": 1 << 12,
    "num_heads": 1 << 14,
    "num_kv_heads": 1 << 14,
    "intermediate_size": 1 << 22,
    "max_position_embeddings": (1 << 31) - 1,
    "rope_theta": 1e30,
    "rms_norm_eps": 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of an InternLM2 model. The defaults are the values of all releases.

    Attributes:
      vocab_size: rows of the embedding (V).
      hidden_size: width of the residual stream (D); a multiple of num_heads.
      num_layers: blocks (L).
      num_heads: query heads (N); a multiple of num_kv_heads.
      num_kv_heads: key/value heads (K).
      intermediate_size: width of the feed-forward layer (F).
      rms_norm_eps: added to the mean square in RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None: plain rotary embedding at every length.
      max_position_embeddings: trained length in tokens; beyond it dynamic scaling changes the base.
      bias: wqkv and wo have biases (the feed-forward layer and the output matrix never have any).
      tie_word_embeddings: the output matrix is the embedding.
      pad_token_id: row of the embedding that gets no gradient, see `models.internlm2`; or NO_ID.
      bos_token_id: first token of a text; or NO_ID.
      eos_token_id: last token of a document; or NO_ID.
      initializer_range: standard deviation of random weights.

    Raises:
      ValueError: a size is not positive or absurdly large, or the heads do not divide.
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
        for field, most in _BOUNDS.items():
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")
            if not getattr(self, field) <= most:
                raise ValueError(f"{field}={getattr(self, field)!r:.40} must be at most {most:,}")
        for field in _IDS:
            if abs(getattr(self, field)) >= 1 << 31:
                raise ValueError(f"{field}={getattr(self, field)!r:.40} must be below 2^31")
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

    def differences(self, other: "ModelConfig") -> list[str]:
        """Return the fields in which a base model differs from this one.

        The rotary scaling does not count: training may extend it (--rope_factor).
        """
        names = (field.name for field in dataclasses.fields(self) if field.name != "rope_scaling")
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @property
    def head_dim(self) -> int:
        """Return the width of one head (H)."""
        return self.hidden_size // self.num_heads

    @property
    def group_size(self) -> int:
        """Return the number of query heads per key/value head (G)."""
        return self.num_heads // self.num_kv_heads

    def num_params(self) -> int:
        """Return the number of parameters; a tied output matrix is not counted again."""
        D, F, H, L = self.hidden_size, self.intermediate_size, self.head_dim, self.num_layers
        wqkv_width = (self.num_heads + 2 * self.num_kv_heads) * H
        layer = D * wqkv_width + D * D + 3 * D * F + 2 * D
        if self.bias:
            layer += wqkv_width + D
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * D + L * layer + D

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Create a configuration from the contents of a HF config.json.

        Both formats are accepted: rope_scaling and rope_theta (transformers 4), or rope_parameters
        with both (transformers 5). A missing key means the default of the original's configuration
        class, `HF_DEFAULTS`, not a released value. The dtype of the stored weights (torch_dtype,
        dtype) is not read: the weights files name the dtype of each tensor. The config.json of an
        InternLM2 in Llama's layout is accepted, see `models.llama_config`.

        Returns:
          The configuration. Of a list of eos ids it keeps the first; all of the list stop
          generation, see `models.generate.stop_ids_of`.

        Raises:
          ValueError: another model_type or activation, or a value that the original refuses.
        """
        if hf.get("model_type") == "llama":
            hf = from_llama(hf)
        if (found := hf.get("model_type")) != "internlm2":
            raise ValueError(
                f"model_type={found!r} in config.json must be 'internlm2', or 'llama' for an "
                "InternLM2 in Llama's layout"
            )
        value = {**HF_DEFAULTS, **hf}
        if value["hidden_act"] != "silu":
            raise ValueError(f"hidden_act={value['hidden_act']!r} must be 'silu'")
        if isinstance(value["eos_token_id"], list):
            value["eos_token_id"] = next(iter(value["eos_token_id"]), None)
        if value["num_key_value_heads"] is None:
            value["num_key_value_heads"] = value["num_attention_heads"]
        value |= {name: NO_ID for name in _IDS if value[name] is None}
        theta, value["rope_scaling"] = rope_from_hf(hf)
        value["rope_theta"] = HF_DEFAULTS["rope_theta"] if theta is None else theta
        return cls(
            **{
                field.name: _checked(field.name, value[_hf_name(field)], field.type)
                for field in dataclasses.fields(cls)
            }
        )

    def to_hf(self, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return the contents of a config.json like those of the releases (transformers 4 keys).

        Args:
          dtype: dtype of the stored weights, written as torch_dtype.

        Returns:
          A dict for JSON; `from_hf` returns this configuration from it.
        """
        fields = {_hf_name(f): getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {name: None for name in _IDS if fields[name] == NO_ID}
        scaling = self.rope_scaling
        hf = fields | {
            "architectures": ["InternLM2ForCausalLM"],
            "attn_implementation": "eager",
            "auto_map": {
                "AutoConfig": "configuration_internlm2.InternLM2Config",
                "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
                "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            },
            "hidden_act": "silu",
            "model_type": "internlm2",
            # The original accepts a float factor only, never an int.
            "rope_scaling": scaling and {"type": scaling.type, "factor": float(scaling.factor)},
            "torch_dtype": dtype,
            "use_cache": True,
        }
        return dict(sorted(hf.items()))


def _hf_name(field: dataclasses.Field) -> str:
    """Return the key of a field in HF's config.json."""
    return _HF_NAMES.get(field.name, field.name)


def _checked(name: str, value: Any, kind: Any) -> Any:
    """Return a field's value from JSON; raise ValueError if it has another type."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        int: number and isinstance(value, int),
        float: number and abs(value) <= sys.float_info.max,
        bool: isinstance(value, bool),
    }
    if not right.get(kind, True):
        raise ValueError(f"{name}={value!r:.40} in config.json must be {_TYPE_NAMES[kind]}")
    return float(value) if kind is float else value


def _preset(V: int, D: int, L: int, N: int, K: int, F: int, rope_factor: float) -> ModelConfig:
    return ModelConfig(
        vocab_size=V,
        hidden_size=D,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        intermediate_size=F,
        rope_scaling=RopeScaling(type="dynamic", factor=rope_factor),
    )


PRESETS: Mapping[str, ModelConfig] = {
    # 3.3 million parameters, for a CPU. 320 ids: the byte tokenizer's 265, rounded up to 64s.
    "nano": _preset(V=320, D=256, L=4, N=4, K=2, F=768, rope_factor=2.0),
    "internlm2-1.8b": _preset(V=92544, D=2048, L=24, N=16, K=8, F=8192, rope_factor=2.0),
    "internlm2-7b": _preset(V=92544, D=4096, L=32, N=32, K=8, F=14336, rope_factor=2.0),
    "internlm2-20b": _preset(V=92544, D=6144, L=48, N=48, K=8, F=16384, rope_factor=3.0),
}
