"""Attention over remembered keys and values: prefill of prompts, then one token at a time.

B batch, T prompt slots, S cache slots, N query heads, K kv heads, H head dim, V vocab, L layers.

Prompts of different lengths are padded on the left, so that all rows write the same slot.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn import Mask, attention
from models import sharding
from models.internlm2 import InternLM2, logits
from models.layers import document_positions, rope_table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """What a decoder remembers of its rows.

    Attributes:
      k_LBSKH: keys after rotary embedding, with the base that was current when they were written
        (as in the original: a base that grows later does not turn them again).
      v_LBSKH: values.
      filled_BS: 1 where a slot holds a token, 0 where it is padding or still empty.
      used: slots in use, the same in every row; the next token goes there.
      lengths_B: tokens of each row, which is the position of its next one.
    """

    k_LBSKH: Float[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"]
    filled_BS: Int[Array, "B S"]
    used: Int[Array, ""]
    lengths_B: Int[Array, " B"]


def prefill(
    model: InternLM2,
    tokens_BT: Int[Array, "B T"],
    filled_BT: Int[Array, "B T"],
    *,
    capacity: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads whole prompts with the model's own attention.

    Args:
      model: the model.
      tokens_BT: prompts, padded on the left.
      filled_BT: 1 for a token, 0 for padding; the last column is all ones.
      capacity: slots of the cache, at least T (static).

    Returns:
      Logits after the last token, fp32, and the cache.

    Raises:
      ValueError: capacity is below T.
    """
    T = tokens_BT.shape[1]
    if capacity < T:
        raise ValueError(f"cache capacity={capacity} must be at least the {T} slots of the prompts")
    with sharding.mesh_of(model.norm_D[...]):
        tokens_BT = sharding.constrain(tokens_BT, "batch", None)
        filled_BT = sharding.constrain(filled_BT, "batch", None)
        mask = model.prepare_mask(tokens_BT.shape, filled_BT)

        def attend(q_BTNH, k_BTKH, v_BTKH, _):
            return attention(q_BTNH, k_BTKH, v_BTKH, mask, impl=model.attn), (k_BTKH, v_BTKH)

        rope = rope_table(document_positions(filled_BT), model.config, segment_ids=filled_BT)
        x_BTD, (k_LBTKH, v_LBTKH) = model.run_blocks(model.embed(tokens_BT), rope, attend)
        room = [(0, 0), (0, 0), (0, capacity - T), (0, 0), (0, 0)]
        cache = KVCache(
            k_LBSKH=jnp.pad(k_LBTKH, room),
            v_LBSKH=jnp.pad(v_LBTKH, room),
            filled_BS=jnp.pad(filled_BT, room[1:3]),
            used=jnp.int32(T),
            lengths_B=filled_BT.sum(axis=1, dtype=jnp.int32),
        )
        return _last_logits(model, x_BTD), cache


def decode(
    model: InternLM2, cache: KVCache, tokens_B: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads one more token a row. The cache must have a free slot (the caller counts).

    Args:
      model: the model.
      cache: donate it under jit: it is then updated in place.
      tokens_B: the tokens that were chosen.

    Returns:
      Logits after these tokens, fp32, and the cache with them.
    """
    with sharding.mesh_of(model.norm_D[...]):
        tokens_B1 = sharding.constrain(tokens_B[:, None], "batch", None)
        new_B1 = jnp.ones_like(tokens_B1)
        filled_BS = _write(cache.filled_BS, new_B1, cache.used, axis=1)
        mask = Mask(segment_ids=new_B1, kv_segment_ids=filled_BS, causal=False)

        def attend(q_B1NH, k_B1KH, v_B1KH, layer_cache):
            k_BSKH, v_BSKH = layer_cache
            k_BSKH = _write(k_BSKH, k_B1KH, cache.used, axis=1)
            v_BSKH = _write(v_BSKH, v_B1KH, cache.used, axis=1)
            # One query a row is a matrix-vector product: no kernel for long rows helps it.
            return attention(q_B1NH, k_BSKH, v_BSKH, mask, impl="xla"), (k_B1KH, v_B1KH)

        rope = rope_table(cache.lengths_B[:, None], model.config)
        carried = (cache.k_LBSKH, cache.v_LBSKH)
        x_B1D, (k_LB1KH, v_LB1KH) = model.run_blocks(model.embed(tokens_B1), rope, attend, carried)
        cache = KVCache(
            k_LBSKH=_write(cache.k_LBSKH, k_LB1KH, cache.used, axis=2),
            v_LBSKH=_write(cache.v_LBSKH, v_LB1KH, cache.used, axis=2),
            filled_BS=filled_BS,
            used=cache.used + 1,
            lengths_B=cache.lengths_B + 1,
        )
        return _last_logits(model, x_B1D), cache


def _write(cache, new, slot, *, axis):
    return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis)


def _last_logits(model, x_BTD):
    """Logits of the last slot, whole on every device: sampling needs all of a row."""
    return sharding.constrain(logits(x_BTD[:, -1:], model.unembedding())[:, 0], "batch", None)
