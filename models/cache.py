"""KV cache: prefill of prompts, then decoding of one token at a time.

B batch, T prompt slots, S cache slots, N query heads, K kv heads, H head dim, V vocab, L layers.

Prompts of different lengths are padded on the left, so that all rows write the same slot. The keys
and values of each layer are separate arrays, which a step updates in place. From a stack of all
layers a step would read, write and read again the part of every layer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxattn import attention
from jaxattn.cached import BLOCK, attend_cached
from models import sharding
from models.internlm2 import InternLM2, logits
from models.layers import document_positions, rope_table

SLOTS = 64  # small caches, and prompts, are padded to a multiple of this


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens so far, for each row of a batch.

    Attributes:
      k_BKSH: for each layer, keys after rotary embedding, with the base at the time they were
        written (as in the original, which does not rotate them again when the base grows).
      v_BKSH: for each layer, values.
      filled_BS: 1 for a slot with a token, 0 for padding and empty slots; int32.
      used: number of used slots, the same in every row, and the slot of the next token.
      lengths_B: tokens of each row, which is the position of the next one.
    """

    k_BKSH: tuple[Float[Array, "B K S H"], ...]
    v_BKSH: tuple[Float[Array, "B K S H"], ...]
    filled_BS: Int[Array, "B S"]
    used: Int[Array, ""]
    lengths_B: Int[Array, " B"]


def capacity_for(slots: int) -> int:
    """Round a number of slots up to a capacity that attention reads efficiently.

    Requests of similar lengths get the same capacity, and so share one compilation.
    """
    multiple = SLOTS if slots <= 2 * BLOCK else BLOCK
    return -(-slots // multiple) * multiple


def prefill(
    model: InternLM2,
    tokens_BT: Int[Array, "B T"],
    filled_BT: Int[Array, "B T"],
    *,
    capacity: int,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Process whole prompts with the model's attention implementation.

    The prompts are padded on the left: filled_BT is 1 for a token and 0 for padding, and its last
    column is all ones. Under a mesh T is a multiple of its seq axis. The cache has `capacity`
    slots, see `capacity_for`.

    Returns:
      Logits [B, V] after the last token, fp32, and the cache.

    Raises:
      ValueError: capacity is below T.
    """
    T = tokens_BT.shape[1]
    if capacity < T:
        raise ValueError(f"cache capacity={capacity} must be at least the {T} slots of the prompts")
    with sharding.mesh_of(model.norm_D[...]):
        tokens_BT = sharding.constrain(tokens_BT, "batch", "seq")
        filled_BT = sharding.constrain(filled_BT, "batch", None)
        mask = model.prepare_mask(tokens_BT.shape, filled_BT)

        def attend(q_BTNH, k_BTKH, v_BTKH, _):
            o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, mask, impl=model.execution.attn)
            # Decoding reads whole rows: the cache is not split over seq.
            return o_BTNH, tuple(
                sharding.constrain(x, "batch", None, "heads", None) for x in (k_BTKH, v_BTKH)
            )

        rope = rope_table(document_positions(filled_BT), model.config, segment_ids=filled_BT)
        x_BTD, (k_LBTKH, v_LBTKH) = model.run_blocks(model.embed(tokens_BT), rope, attend)
        cache = KVCache(
            k_BKSH=_by_layer(k_LBTKH, capacity),
            v_BKSH=_by_layer(v_LBTKH, capacity),
            filled_BS=jnp.pad(filled_BT, [(0, 0), (0, capacity - T)]),
            used=jnp.int32(T),
            lengths_B=filled_BT.sum(axis=1, dtype=jnp.int32),
        )
        return _last_logits(model, x_BTD), cache


def decode(
    model: InternLM2, cache: KVCache, tokens_B: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], KVCache]:
    """Process one token of each row. The caller ensures that the cache has a free slot.

    A cache that is donated under jit is updated in place.

    Returns:
      Logits [B, V] after these tokens, fp32, and the cache with their keys and values.
    """
    with sharding.mesh_of(model.norm_D[...]):
        tokens_B1 = sharding.constrain(tokens_B[:, None], "batch", None)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache.used)
        filled_BS = write(cache.filled_BS, jnp.ones_like(tokens_B1), axis=1)

        def attend(q_B1NH, k_B1KH, v_B1KH, layer_cache):
            k_BKSH, v_BKSH = layer_cache
            k_BKSH = write(k_BKSH, k_B1KH.swapaxes(1, 2), axis=2)
            v_BKSH = write(v_BKSH, v_B1KH.swapaxes(1, 2), axis=2)
            o_BNH = attend_cached(q_B1NH[:, 0], k_BKSH, v_BKSH, filled_BS)
            return o_BNH[:, None], (k_BKSH, v_BKSH)

        rope = rope_table(cache.lengths_B[:, None], model.config)
        layers = list(zip(cache.k_BKSH, cache.v_BKSH, strict=True))
        # No scan, which first copies the weights of every layer out of their stack.
        x_B1D, layers = model.run_blocks(model.embed(tokens_B1), rope, attend, layers, scan=False)
        k_BKSH, v_BKSH = zip(*layers, strict=True)
        cache = KVCache(
            k_BKSH=k_BKSH,
            v_BKSH=v_BKSH,
            filled_BS=filled_BS,
            used=cache.used + 1,
            lengths_B=cache.lengths_B + 1,
        )
        return _last_logits(model, x_B1D), cache


def _by_layer(x_LBTKH: Array, capacity: int) -> tuple[Array, ...]:
    """Split the keys or values of prompts into one array per layer, padded to the capacity."""
    room = [(0, 0), (0, 0), (0, capacity - x_LBTKH.shape[2]), (0, 0)]
    return tuple(jnp.pad(x_BTKH.swapaxes(1, 2), room) for x_BTKH in x_LBTKH)


def _last_logits(model, x_BTD):
    """Compute the logits of the last slot, not split over the vocabulary, as sampling needs."""
    last_B1D = sharding.constrain(x_BTD, "batch", None, None)[:, -1:]
    return sharding.constrain(logits(last_B1D, model.unembedding())[:, 0], "batch", None)
