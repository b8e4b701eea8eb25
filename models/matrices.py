"""Classify the model's parameters by name, for optimizers that treat matrices differently."""

from collections.abc import Mapping

MATRICES: Mapping[str, tuple[tuple[int, ...], int]] = {
    "wqkv_DKgH": ((-4,), -1),  # every head of q, k, v is a matrix of its own
    "wo_NHD": ((-3, -2), -1),
    "w1_DF": ((-2,), -1),
    "w3_DF": ((-2,), -1),
    "w2_FD": ((-2,), -1),
}
"""(input dimensions, output dimension) of each matrix of a block, by parameter name. Other
dimensions, such as layers, count matrices."""


def is_norm_or_bias(name: str) -> bool:
    """Return True for the scale of a norm and for a bias: vectors, which are not decayed."""
    return "norm" in name or "bias" in name
