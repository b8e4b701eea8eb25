"""How rotary angles change beyond the trained length, and how config.json says so."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# What the original's configuration class assumes where config.json has no such key.
HF_DEFAULT_ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary angles change for rows longer than the model was trained on.

    Attributes:
      type: "linear" divides every position by factor; "dynamic" (NTK) raises the base, and only
        for a document longer than max_position_embeddings.
      factor: at least 1.
    """

    type: str
    factor: float

    def __post_init__(self):
        if self.type not in ("linear", "dynamic"):
            raise ValueError(f"rope_scaling type={self.type!r} must be 'linear' or 'dynamic'")
        if not self.factor >= 1:
            raise ValueError(f"rope_scaling factor={self.factor} must be at least 1")


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) of a HF config.json, from either spelling or both where they agree.

    Args:
      hf: contents of config.json; see `models.config.ModelConfig.from_hf`.

    Raises:
      ValueError: they disagree, or hold what the original refuses too.
    """
    spellings = {
        name: _parse_rope(name, hf[name])
        for name in ("rope_scaling", "rope_parameters")
        if hf.get(name) is not None
    }
    thetas = {theta for theta, _ in spellings.values() if theta is not None}
    if hf.get("rope_theta") is not None:
        thetas.add(_theta(hf["rope_theta"]))
    if len(thetas) > 1 or len({scaling for _, scaling in spellings.values()}) > 1:
        raise ValueError(
            f"config.json contradicts itself about rope: rope_theta={hf.get('rope_theta')}, "
            f"rope_scaling={hf.get('rope_scaling')}, rope_parameters={hf.get('rope_parameters')}"
        )
    scaling = next((scaling for _, scaling in spellings.values()), None)
    return (thetas.pop() if thetas else HF_DEFAULT_ROPE_THETA), scaling


def _parse_rope(name: str, rope: Any) -> tuple[float | None, RopeScaling | None]:
    """(theta or None, scaling or None) of one dict {type | rope_type, factor, rope_theta}."""
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name}={rope!r} in config.json must be null or a dict {{type, factor}}")
    if unknown := rope.keys() - {"type", "rope_type", "factor", "rope_theta"}:
        raise ValueError(f"{name} in config.json has unknown keys {sorted(unknown)}")
    theta = rope.get("rope_theta")
    theta = None if theta is None else _theta(theta)
    kind = rope.get("type", rope.get("rope_type"))
    if rope.get("rope_type", kind) != kind:
        raise ValueError(f"{name}={dict(rope)} in config.json: type and rope_type differ")
    if kind == "default" or (kind is None and "factor" not in rope and theta is not None):
        return theta, None
    factor = rope.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ValueError(f"{name} factor={factor!r} in config.json must be a number, at least 1")
    return theta, RopeScaling(type=str(kind), factor=float(factor))


def _theta(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"rope_theta={value!r} in config.json must be a number")
    return float(value)
