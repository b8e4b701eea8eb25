"""Attention with documents in packed rows, forward and backward, without the rest of the project.

    python examples/attention_alone.py

On a Hopper GPU the Pallas kernel runs, elsewhere XLA's attention. Needs jax, jaxtyping and psutil.

B batch, T query position, N query heads, K key/value heads, H head dim.
"""

import jax
import jax.numpy as jnp

from jaxattn import Mask, attention, describe, prepare

B, T, N, K, H = 2, 512, 8, 2, 128


def main() -> None:
    """Compute the output and the gradients for two rows with three documents and padding each."""
    q_BTNH = jax.random.normal(jax.random.key(0), (B, T, N, H), jnp.bfloat16)
    k_BTKH, v_BTKH = jax.random.normal(jax.random.key(1), (2, B, T, K, H), jnp.bfloat16)

    # Segment ids: equal numbers are one document, 0 is padding. Masks are causal by default.
    lengths = jnp.array([200, 150, 100, 62])
    ids_T = jnp.repeat(jnp.array([1, 2, 3, 0]), lengths, total_repeat_length=T)
    mask = Mask(segment_ids=jnp.broadcast_to(ids_T, (B, T)))

    # Once per batch: the tile metadata, which all layers share. Without it each call computes it.
    mask = prepare(mask, q_BTNH, k_BTKH)
    print("implementation:", describe("auto", q_BTNH, k_BTKH, mask))

    @jax.jit
    def loss_and_gradients(q, k, v, mask):
        def loss(q, k, v):
            out_BTNH = attention(q, k, v, mask)
            return jnp.sum(out_BTNH.astype(jnp.float32) ** 2), out_BTNH

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    (loss, out_BTNH), gradients = loss_and_gradients(q_BTNH, k_BTKH, v_BTKH, mask)
    print("output:", out_BTNH.shape, out_BTNH.dtype, "loss:", float(loss))
    for name, gradient in zip("qkv", gradients, strict=True):
        print(f"gradient of {name}:", gradient.shape)
    padding = out_BTNH[:, ids_T == 0]
    print("output of the padding is exactly 0:", not bool(jnp.any(padding)))

    # The log-sum-exp joins results over parts of the keys.
    _, lse_BTN = attention(q_BTNH, k_BTKH, v_BTKH, mask, return_lse=True)
    print("log-sum-exp:", lse_BTN.shape, lse_BTN.dtype)


if __name__ == "__main__":
    main()
