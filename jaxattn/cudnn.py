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
      NotImplementedError: the mask has documents or a block pattern. jax.nn has no public mask
        for either with cuDNN, and a dense one would be T x S in memory and slow. Or a window
        without causal, which cuDNN has not.

    References:
      jax.nn.dot_product_attention.
    """
    if mask.segment_ids is not None:
        raise NotImplementedError(
            "cudnn has no document mask (segment_ids given); use impl='pallas' or impl='xla'"
        )
    if mask.blocks is not None:
        raise NotImplementedError(
            "cudnn has no block mask (blocks given); use impl='pallas' or impl='xla'"
        )
    if mask.window is not None and not mask.causal:
        raise NotImplementedError(
            "cudnn has a window only with causal; use impl='pallas' or impl='xla'"
        )
    window = None if mask.window is None else (mask.window - 1, 0)
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
