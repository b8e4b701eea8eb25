"""cuDNN's fused attention through jax.nn: a strong baseline for rows of one document."""

import jax
from jaxtyping import Array, Float

from jaxattn.mask import Mask


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """`jax.nn.dot_product_attention(implementation="cudnn")`, causal and window masks only.

    Raises:
      NotImplementedError: the mask has documents. jax.nn has no public document mask for cuDNN,
        and a dense one would be T x S in memory and slow.

    References:
      jax.nn.dot_product_attention.
    """
    if mask.segment_ids is not None:
        raise NotImplementedError(
            "cudnn has no document mask (segment_ids given); use impl='pallas' or impl='xla'"
        )
    window = None
    if mask.window is not None:
        window = (mask.window - 1, 0 if mask.causal else mask.window - 1)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def why_not(*, deterministic: bool, return_lse: bool) -> str | None:
    """What jax.nn cannot ask of cuDNN; None if it can."""
    if deterministic:
        return (
            "jax.nn cannot ask cuDNN for a backward pass that gives the same bits in every run "
            "(deterministic=True); use impl='pallas' or impl='xla'"
        )
    if return_lse:
        return (
            "jax.nn rounds cuDNN's log-sum-exp to 16 bits and drops its gradient "
            "(return_lse=True); use impl='pallas' or impl='xla'"
        )
    return None
