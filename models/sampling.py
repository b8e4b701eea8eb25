"""Sampling of the next token: temperature, top-k, top-p.

B batch, V vocab.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling.

    Attributes:
      temperature: divisor of the logits, at least 1e-6; 0: take the most likely token (greedy).
      top_k: sample from the k most likely tokens; 0: from all.
      top_p: sample from the most likely tokens that together reach this probability; 1: from all.

    Raises:
      ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0: greedy)")
        if 0 < self.temperature < 1e-6:  # logits divided by it overflow
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or at least 1e-6")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1: all tokens)")


def sample(logits_BV: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, " B"]:
    """Sample the next token of each row, int32: temperature, then top_k, then top_p.

    References:
      Holtzman et al. 2020, arXiv:1904.09751 (top-p).
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token is kept while the tokens before it have not reached top_p; the first always is.
        stays_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p
        smallest_B1 = jnp.where(stays_BV, sorted_BV, jnp.inf).min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
