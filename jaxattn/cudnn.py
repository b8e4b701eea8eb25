"""Fused attention of cuDNN through jax.nn: a strong baseline for rows of one document."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn.device import DeviceSpec
from jaxattn.mask import Mask, Shaped


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Call `jax.nn.dot_product_attention(implementation="cudnn")`: causal and window masks only.

    `jaxattn.resolve` refuses other calls, see `why_not`.

    References:
      jax.nn.dot_product_attention.
    """
    reach = mask.reach(q_BTNH.shape[1], k_BSKH.shape[1])
    window = None if reach is None else (reach, 0)
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def why_not(
    device: jax.Device | DeviceSpec,
    q: Shaped,
    mask: Mask | None,
    *,
    deterministic: bool,
    return_lse: bool,
) -> str | None:
    """Return the reason why jax.nn cannot run a call by cuDNN, with the remedy; None if it can.

    jax.nn has no public mask for documents or block patterns with cuDNN, and a dense mask would be
    T x S in memory and slow.
    """
    if device.platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU, this is a {device.platform} device; use impl='xla'"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}; use impl='xla'"
    if mask is not None and mask.segment_ids is not None:
        return "it has no document mask (segment_ids given); use impl='pallas' or impl='xla'"
    if mask is not None and mask.blocks is not None:
        return "it has no block mask (blocks given); use impl='pallas' or impl='xla'"
    if mask is not None and mask.window is not None and not mask.causal:
        return "cuDNN takes a window only with causal; use impl='pallas' or impl='xla'"
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
