"""Shapes of the attention bench, and the useful work of each."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxattn.mask import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape and mask of a problem.

    Attributes:
      batch: rows.
      length: tokens in a row, queries and keys.
      heads: query heads.
      kv_heads: key and value heads.
      documents: (median, sigma) of the log-normal document lengths that fill each row; None: one
        document per row.
      window: sliding window in tokens; None: unlimited.
      head_dim: head dim of queries, keys and values.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    documents: tuple[float, float] | None = None
    window: int | None = None
    head_dim: int = 128

    def segment_ids(self) -> np.ndarray | None:
        """Return the documents of every row, int32 [batch, length]; None: one document per row."""
        if self.documents is None:
            return None
        lengths = document_lengths(self.length, *self.documents)
        row = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
        return np.tile(row, (self.batch, 1))

    def mask(self) -> Mask:
        """Return the causal mask, with documents drawn by `numpy.random.default_rng(0)`."""
        ids = self.segment_ids()
        return Mask(segment_ids=None if ids is None else jnp.asarray(ids), window=self.window)

    def pairs(self) -> int:
        """Count the visible query-key pairs of the batch."""
        lengths = [self.length]
        if self.documents is not None:
            lengths = document_lengths(self.length, *self.documents)
        window = self.window or self.length
        # The first `window` queries of a document see 1, 2, ... keys, the others `window`.
        full = [min(n, window) for n in lengths]
        pairs = (m * (m + 1) // 2 + (n - m) * window for n, m in zip(lengths, full, strict=True))
        return self.batch * sum(pairs)

    def flops(self) -> float:
        """Return the useful FLOPs of a forward pass."""
        return 4.0 * self.heads * self.head_dim * self.pairs()


# Implementations of PyTorch, measured by `torch_cell`.
TORCH = ("torch-sdpa", "torch-flex", "torch-fa4")
# FlashAttention-3 called from JAX, measured by `cell` through `fa3`.
FA3 = "fa3"
SHAPES = {
    "1.8b_32k_causal": Shape(batch=1, length=32768, heads=16, kv_heads=8),
    "7b_32k_causal": Shape(batch=1, length=32768, heads=32, kv_heads=8),
    "20b_32k_causal": Shape(batch=1, length=32768, heads=48, kv_heads=8),
    "7b_32k_packed": Shape(batch=1, length=32768, heads=32, kv_heads=8, documents=(1500.0, 1.0)),
    "7b_32k_packed_short": Shape(
        batch=1, length=32768, heads=32, kv_heads=8, documents=(350.0, 0.8)
    ),
    "7b_32k_packed_sft": Shape(batch=1, length=32768, heads=32, kv_heads=8, documents=(141.0, 0.7)),
    "7b_32k_window4k": Shape(batch=1, length=32768, heads=32, kv_heads=8, window=4096),
    "7b_4k_causal": Shape(batch=8, length=4096, heads=32, kv_heads=8),
    "7b_512_causal": Shape(batch=32, length=512, heads=32, kv_heads=8),
}
# Small enough for a CPU: a test that the bench runs, not a measurement.
SMOKE = {
    "smoke": Shape(batch=2, length=128, heads=4, kv_heads=2, documents=(40.0, 0.7), head_dim=64)
}


def shape_of(name: str) -> Shape:
    """Return the shape of a name."""
    return (SHAPES | SMOKE)[name]


def document_lengths(total: int, median: float, sigma: float) -> list[int]:
    """Draw log-normal lengths in [16, 16384], whose sum is `total`; the last document is cut."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = int(np.clip(rng.lognormal(np.log(median), sigma), 16, 16384))
        lengths.append(min(drawn, total - sum(lengths)))
    return lengths
