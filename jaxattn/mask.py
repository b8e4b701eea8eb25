"""Attention mask: the definition of visible query-key pairs for all implementations.

B batch, T query position, S key position. `block_map.py` derives the work of the kernels from the
mask.
"""

import dataclasses
import numbers
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# Tokens on a side of a block of `Mask.blocks`.
BLOCK = 128

Shaped = Array | jax.ShapeDtypeStruct


# jax rebuilds it with placeholders in place of arrays, which type checkers must let pass.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Mask under which query i of row b sees key j of row b if all given conditions hold.

    * causal: j <= i. Both count from the start of the row, also when T and S differ.
    * window: i - j < window and, without `causal`, also j - i < window. A token sees itself
      and the window - 1 tokens before it.
    * segment ids: equal and not 0. Id 0 is padding: it sees nothing and nothing sees it; its
      output and its gradients are exactly 0. The values of padding must be finite: hidden values
      are multiplied by 0, and 0 * NaN is NaN.
    * blocks: blocks[i // 128, j // 128], or blocks[b, i // 128, j // 128]. Any pattern, holes and
      empty rows included; the last block of a ragged row is cut.

    T = S = 4, rows are queries, `x` is visible:

        causal          window=2        segment_ids=[1, 1, 2, 0]
        x . . .         x . . .         x . . .
        x x . .         x x . .         x x . .
        x x x .         . x x .         . . x .
        x x x x         . . x x         . . . .

    T = S = 512, one character is a block of 128 x 128 tokens: `#` is visible, `h` its causal
    half. Causal attention to the first block and to the query's own block (`blocks` needs no zeros
    above the diagonal, because the conditions combine by AND):

        causal          blocks          both
        h . . .         # . . .         h . . .
        # h . .         # # . .         # h . .
        # # h .         # . # .         # . h .
        # # # h         # . . #         # . . h

    Attributes:
      segment_ids: document of each query, int32 [B, T]; None: one document per row.
      kv_segment_ids: document of each key, int32 [B, S]; None: the same as segment_ids.
      causal: hide the keys after the query.
      window: sliding window in tokens, at least 1; None: unlimited.
      blocks: block pattern, bool [T / 128, S / 128] for all rows of the batch or [B, T / 128,
        S / 128] for each, T / 128 and S / 128 rounded up; None: every block.
      plan: tile metadata of one implementation, set by `jaxattn.prepare`, never by hand. After a
        change of another attribute, call `jaxattn.prepare` again.
    """

    segment_ids: Int[Array, "B T"] | None = None
    kv_segment_ids: Int[Array, "B S"] | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    blocks: Bool[Array, "*B P Q"] | None = None
    plan: Any = None

    @property
    def key_ids(self) -> Int[Array, "B S"] | None:
        """Segment ids of the keys; None: one document per row."""
        return self.segment_ids if self.kv_segment_ids is None else self.kv_segment_ids

    @property
    def kind(self) -> str:
        """Conditions of the mask in words, for log lines."""
        parts = ["causal"] if self.causal else []
        parts += ["documents"] if self.segment_ids is not None else []
        parts += [f"window {self.window}"] if self.window is not None else []
        parts += ["blocks"] if self.blocks is not None else []
        return " + ".join(parts) or "full"

    def validate(self, batch: int, t: int, s: int) -> None:
        """Check the mask against a call of `batch` rows with t queries and s keys each.

        Raises:
          ValueError: a shape, a dtype or the window does not fit, or a value is no array.
        """
        window = self.window
        if window is not None:
            if not isinstance(window, numbers.Integral) or isinstance(window, bool):
                raise ValueError(f"window={window!r} must be a number of tokens, an int, or None")
            if window < 1:
                raise ValueError(f"window={window} must be at least 1 (1: a token sees itself)")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal={self.causal!r} must be True or False")
        for name in ("segment_ids", "kv_segment_ids", "blocks"):
            value = getattr(self, name)
            if value is not None and not hasattr(value, "dtype"):
                kind = type(value).__name__
                raise ValueError(f"{name} is a {kind}, must be an array: jnp.asarray({name})")
        self._validate_blocks(batch, t, s)
        query_ids, key_ids = self.segment_ids, self.key_ids
        if query_ids is None or key_ids is None:
            if key_ids is not None:
                raise ValueError("kv_segment_ids without segment_ids: give both, or segment_ids")
            return
        if self.kv_segment_ids is None and t != s:
            raise ValueError(f"kv_segment_ids must be given because T={t} and S={s} differ")
        named = (("segment_ids", query_ids, t), ("kv_segment_ids", key_ids, s))
        for name, ids, length in named:
            if ids.shape != (batch, length):
                raise ValueError(f"{name} has shape {ids.shape}, must be {(batch, length)}")
            if not jnp.issubdtype(ids.dtype, jnp.integer):
                raise ValueError(f"{name} has dtype {ids.dtype}, must be an integer (int32)")

    def _validate_blocks(self, batch: int, t: int, s: int) -> None:
        if self.blocks is None:
            return
        shape, dtype = self.blocks.shape, self.blocks.dtype
        pattern = -(-t // BLOCK), -(-s // BLOCK)
        if shape not in (pattern, (batch, *pattern)):
            raise ValueError(
                f"blocks has shape {shape}, must be {pattern} or {(batch, *pattern)}: "
                f"B={batch}, T={t} / {BLOCK} and S={s} / {BLOCK} rounded up"
            )
        if dtype != jnp.bool_:
            raise ValueError(f"blocks has dtype {dtype}, must be bool (for 0 and 1: blocks != 0)")

    def reach(self, t: int, s: int) -> int | None:
        """Return the largest visible distance in tokens under the window; None: no window.

        At most the tokens of a row (t queries, s keys), so that int32 positions can be added to it.
        """
        return None if self.window is None else min(int(self.window) - 1, max(t, s))

    def visible(
        self, t: int, s: int, *, start: int | Int[Array, ""] = 0, size: int | None = None
    ) -> Bool[Array, "#B size s"]:
        """Return the mask of the queries start .. start + size - 1; by default of all [t, s].

        Args:
          t: queries in a row.
          s: keys in a row.
          start: first query of the slice; may be traced. start + size may exceed t only if the
            caller discards the rows beyond t.
          size: queries in the slice (static); None: all t.

        Returns:
          bool [B or 1, size, s], True where visible. For large T use slices: the array is dense.
        """
        size = t if size is None else size
        i = (start + jax.lax.iota(jnp.int32, size))[None, :, None]
        j = jax.lax.iota(jnp.int32, s)[None, None, :]
        allowed = jnp.ones((1, size, s), bool)
        if self.causal:
            allowed &= j <= i
        reach = self.reach(t, s)
        if reach is not None:
            allowed &= i - j <= reach
            if not self.causal:
                allowed &= j - i <= reach
        query_ids, key_ids = self.segment_ids, self.key_ids
        if query_ids is not None and key_ids is not None:
            ids = jax.lax.dynamic_slice_in_dim(query_ids, start, size, axis=1)[:, :, None]
            allowed = allowed & (ids == key_ids[:, None, :]) & (ids != 0)
        if self.blocks is not None:
            pattern = self.blocks.reshape(-1, *self.blocks.shape[-2:])
            # Queries beyond t, which the caller discards, take the last row.
            rows = jnp.take(pattern, i[0, :, 0] // BLOCK, axis=1, mode="clip")
            allowed = allowed & jnp.repeat(rows, BLOCK, axis=2)[:, :, :s]
        return allowed
