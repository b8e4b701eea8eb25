"""Scaling of rotary embedding beyond the trained length, read from config.json."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MAX_FACTOR = 1e6
TYPES = ("linear", "dynamic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary angles for documents longer than max_position_embeddings.

    Attributes:
      type: "linear" divides every position by factor; "dynamic" (NTK) raises the base, and only
        for a document longer than max_position_embeddings.
      factor: from 1 to 1e6.

    Raises:
      ValueError: a field is out of its range.
    """

    type: str
    factor: float

    def __post_init__(self):
        if self.type not in TYPES:
            raise ValueError(f"rope_scaling type={self.type!r:.40} must be 'linear' or 'dynamic'")
        if not 1 <= self.factor <= MAX_FACTOR:
            raise ValueError(
                f"rope_scaling factor={self.factor} must be at least 1 and at most {MAX_FACTOR:g}"
            )


def rope_from_hf(hf: Mapping[str, Any]) -> tuple[float | None, RopeScaling | None]:
    """Read rope_theta and the scaling from the contents of a HF config.json.

    Args:
      hf: contents of config.json, with the keys of transformers 4 (rope_theta, rope_scaling),
        transformers 5 (rope_parameters), or both if they agree.

    Returns:
      (rope_theta or None if no key names it, scaling or None).

    Raises:
      ValueError: the keys disagree, or a value is not one that the original accepts.
    """
    spellings = {
        name: _parse_rope(name, hf[name])
        for name in ("rope_scaling", "rope_parameters")
        if hf.get(name) is not None
    }
    thetas = {theta for theta, _ in spellings.values() if theta is not None}
    if hf.get("rope_theta") is not None:
        thetas.add(_number("rope_theta", hf["rope_theta"]))
    if len(thetas) > 1 or len({scaling for _, scaling in spellings.values()}) > 1:
        raise ValueError(
            f"config.json contradicts itself about rope: rope_theta={hf.get('rope_theta')}, "
            f"rope_scaling={hf.get('rope_scaling')}, rope_parameters={hf.get('rope_parameters')}"
        )
    scaling = next((scaling for _, scaling in spellings.values()), None)
    return (thetas.pop() if thetas else None), scaling


def _parse_rope(name: str, rope: Any) -> tuple[float | None, RopeScaling | None]:
    """Read (theta or None, scaling or None) from {type | rope_type, factor, rope_theta}."""
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name}={rope!r} in config.json must be null or a dict {{type, factor}}")
    kind = rope.get("type", rope.get("rope_type"))
    if kind not in (None, "default"):
        RopeScaling(type=str(kind), factor=1.0)  # names the type rather than its further keys
    if unknown := rope.keys() - {"type", "rope_type", "factor", "rope_theta"}:
        raise ValueError(f"{name} in config.json has unknown keys {sorted(unknown)}")
    theta = rope.get("rope_theta")
    theta = None if theta is None else _number(f"{name} rope_theta", theta)
    if rope.get("rope_type", kind) != kind:
        raise ValueError(f"{name}={dict(rope)} in config.json: type and rope_type differ")
    if kind == "default" or (kind is None and "factor" not in rope and theta is not None):
        return theta, None
    factor = _number(f"{name} factor", rope.get("factor"), "a number, at least 1")
    return theta, RopeScaling(type=str(kind), factor=factor)


def _number(name: str, value: Any, wanted: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r:.40} in config.json must be {wanted}")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # refused by the bounds of the field
