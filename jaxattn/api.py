"""Public attention API: validates arguments, selects an implementation, dispatches.

B batch, T query pos, S key pos, N query heads, K kv heads, H head dim.
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxattn import cudnn, eager, sharded, xla
from jaxattn import device as hardware
from jaxattn.device import DeviceSpec
from jaxattn.mask import Mask, Shaped

Implementation = Literal["pallas", "pallas_mma", "cudnn", "xla", "eager"]
"""Names of the implementations."""

Impl = Literal["auto", "pallas", "pallas_mma", "cudnn", "xla", "eager", "flash_attention_2", "sdpa"]
"""Values of `impl`: an implementation, an alias, or "auto"."""


def _pallas():
    """Import the kernels at their first use: a program without them starts 0.5 s earlier."""
    from jaxattn.pallas import op

    return op


def _kernel_attention(*inputs, **options):
    """Compute attention with the kernels."""
    return _pallas().attention(*inputs, **options)


IMPLEMENTATIONS: Mapping[Implementation, Callable[..., Any]] = types.MappingProxyType(
    {
        "pallas": _kernel_attention,
        "pallas_mma": _kernel_attention,
        "cudnn": cudnn.attention,
        "xla": xla.attention,
        "eager": eager.attention,
    }
)
"""Implementations by name; the keys are those of `Implementation`."""

ALIASES: Mapping[str, Implementation] = types.MappingProxyType(
    {"flash_attention_2": "pallas", "sdpa": "xla"}
)
"""Names of implementations in transformers and PyTorch, and the implementation here."""

FAMILIES: Mapping[str, str] = types.MappingProxyType({"pallas": "wgmma", "pallas_mma": "mma"})
"""Kernels of the implementations in `jaxattn.pallas`, see `jaxattn.pallas.op.FAMILIES`."""

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


@typing.overload
def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None = None,
    *,
    impl: Impl = "auto",
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: Literal[False] = False,
) -> Float[Array, "B T N H"]: ...


@typing.overload
def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None = None,
    *,
    impl: Impl = "auto",
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: Literal[True],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]: ...


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask | None = None,
    *,
    impl: str = "auto",
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Compute softmax(scale * q k^T + mask) v, differentiable in q, k and v.

    The named implementation runs, or an error names the reason why it cannot; there is no silent
    fallback. Query head n attends with kv head n // (N / K); K and V are not repeated in memory.

    Under an explicit mesh (`jax.set_mesh`, AxisType.Explicit) B and the heads may be sharded: each
    device computes its own part, without communication. T and S may be sharded too, with q, k and v
    alike: all-to-alls exchange positions for heads, each device attends with whole rows of N / n
    query heads, and the output is sharded as q is. n is the number of devices along the axes that
    shard positions and heads. It must divide N; kv heads are repeated where n does not divide K.

    Args:
      q_BTNH: queries, bf16, fp16 or fp32 (pallas and cudnn: bf16, fp16); no axis is empty.
      k_BSKH: keys, same dtype; N must be a multiple of K.
      v_BSKH: values, same shape and dtype as the keys.
      mask: visible pairs of queries and keys; None: causal, one document per row. A mask from
        `prepare` contains the tile metadata of the kernel, so that no layer computes it again.
      impl: "auto", "pallas" (or "flash_attention_2"), "pallas_mma", "cudnn", "xla" (or "sdpa"),
        "eager". "pallas" selects the kernels of the GPU: by wgmma on Hopper, by mma.sync on Ampere,
        Ada and Blackwell workstation GPUs. "pallas_mma" selects the latter, also on Hopper.
      scale: factor on the scores, a finite number (pallas: above 0); None: H ** -0.5.
      deterministic: the same inputs give the same bits in every run, gradients included. Output,
        dk and dv of pallas are deterministic in any case; with this flag a separate kernel sums dq
        in a fixed order (7 products in place of 5). xla and eager sum in a fixed order on a CPU; on
        a GPU, XLA guarantees it under XLA_FLAGS=--xla_gpu_deterministic_ops=true. cudnn refuses:
        jax.nn has no such option.
      return_lse: also return the log-sum-exp, which joins the results of a query over several sets
        of keys.

    Returns:
      [B, T, N, H] in the dtype of q; exactly 0 for queries that see nothing. With return_lse a
      pair of this array and log(sum(exp(scale * q k^T + mask))) of each query, natural logarithm,
      fp32 [B, T, N]; -inf for queries that see nothing. Both are differentiable.

    Raises:
      TypeError: mask is no `Mask`.
      ValueError: the arguments contradict each other, or mask.plan was prepared for others.
      NotImplementedError: the implementation cannot run them, on this device or at all.

    Memory beyond inputs and output: pallas and cudnn O(T) forward and backward; xla 3 to 5 times
    `jaxattn.xla.SLICE_BYTES`, and copies of q; eager O(B N T S), refused if the scores do not fit.

    References:
      Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    mask = Mask() if mask is None else mask
    _check_shapes(q_BTNH, k_BSKH, v_BSKH, mask)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else _number(scale)
    name, _ = resolve(
        impl,
        q_BTNH,
        k_BSKH,
        mask,
        scale=scale,
        deterministic=deterministic,
        return_lse=return_lse,
    )

    def run(q, k, v, mask):
        options: dict[str, Any] = {"return_lse": True} if return_lse else {}
        if name in FAMILIES:  # the others have one form, and `resolve` has checked it
            options |= {"deterministic": deterministic, **_kernels(name)}
        return IMPLEMENTATIONS[name](q, k, v, mask, scale=scale, **options)

    return sharded.run_on_parts(run, q_BTNH, k_BSKH, v_BSKH, mask, return_lse=return_lse)


def prepare(mask: Mask, q: Shaped, k: Shaped, *, impl: str = "auto") -> Mask:
    """Compute the tile metadata that every layer's `attention` with this mask needs.

    Args:
      mask: the mask of a batch.
      q: queries [B, T, N, H], or a ShapeDtypeStruct (with its sharding under a mesh).
      k: keys [B, S, K, H], or a ShapeDtypeStruct.
      impl: as for `attention`.

    Returns:
      The mask, for pallas with its tile metadata in `plan` (int32, O(T) bytes).

    Raises:
      ValueError: as `attention`.
      NotImplementedError: as `attention`.
    """
    _check_shapes(q, k, k, mask)
    name, _ = resolve(impl, q, k, mask)
    if name not in FAMILIES:
        return mask

    q_local, k_local = sharded.local(q, k)

    def plan(mask):
        return _pallas().prepare(mask, q_local, k_local, **_kernels(name)).plan

    return sharded.plan_rows(plan, q, mask)


def resolve(
    impl: str,
    q: Shaped,
    k: Shaped,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    device: jax.Device | DeviceSpec | None = None,
) -> tuple[Implementation, str]:
    """Select the implementation for `impl` on a device.

    Args:
      impl: a value of `Impl`; other names raise ValueError.
      q: queries [B, T, N, H] or a ShapeDtypeStruct.
      k: keys [B, S, K, H] or a ShapeDtypeStruct.
      mask: the mask of the later call; None: the mask is not checked.
      scale: as for `attention`.
      deterministic: as for `attention`.
      return_lse: as for `attention`.
      device: device of the later call; None: jax's default device.

    Returns:
      (name in IMPLEMENTATIONS, reason of the choice in words).

    Raises:
      ValueError: unknown implementation.
      NotImplementedError: the implementation cannot run this call on this device.
    """
    device = hardware.default_device() if device is None else device
    if impl not in typing.get_args(Impl):
        known = ", ".join(typing.get_args(Impl))
        raise ValueError(f"unknown attention implementation {impl!r}; choose one of {known}")
    if impl == "auto":
        name, reason = _choose(device, q, scale)
    else:
        name = ALIASES.get(impl) or typing.cast(Implementation, impl)
        if name == "pallas":
            name = _pallas_on(device)
        reason = "asked for" if name == impl else f"asked for as {impl}"
    if name == "cudnn":
        why_not = cudnn.why_not(device, q, mask, deterministic=deterministic, return_lse=return_lse)
    else:
        why_not = _why_not(name, device, q, k, scale)
    if why_not:
        raise NotImplementedError(f"attention {name!r} cannot run: {why_not}")
    return name, reason


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Selected implementation and its work on a batch, for a log line.

    Attributes:
      impl: name of the implementation.
      reason: reason of the choice.
      device: kind of the device.
      tiles: tiles or slices, in words.
      mask: kind of the mask.
      skipped: fraction of the score matrix's tiles that the forward pass skips; None: unknown.
    """

    impl: Implementation
    reason: str
    device: str
    tiles: str
    mask: str
    skipped: float | None

    def __str__(self) -> str:
        """Format as one line, without the name of the model."""
        skipped = "" if self.skipped is None else f"; {self.skipped:.1%} of tiles skipped"
        return (
            f"{self.impl} ({self.reason}) on {self.device}; tiles {self.tiles}; "
            f"mask {self.mask}{skipped}"
        )


def describe(impl: str, q: Shaped, k: Shaped, mask: Mask) -> Dispatch:
    """Describe the work of `attention` on one concrete batch; not under `jax.jit`.

    Under an explicit mesh the slices or tiles are those of one device's part. `skipped` counts the
    tiles of all rows that the forward kernel does not visit. It is 0 for xla and eager, which
    compute hidden pairs too, and None for cudnn, which does not publish it.

    Args:
      impl: as for `attention`.
      q: queries [B, T, N, H] or a ShapeDtypeStruct.
      k: keys [B, S, K, H] or a ShapeDtypeStruct.
      mask: the mask of the batch, with concrete arrays.

    Raises:
      ValueError: as `attention`.
      NotImplementedError: as `attention`.
    """
    _check_shapes(q, k, k, mask)
    name, reason = resolve(impl, q, k, mask)
    device = hardware.default_device()
    parts = sharded.local(q, k)
    batch, t, num_heads = parts[0].shape[:3]
    s, skipped = k.shape[1], 0.0
    if name in FAMILIES:  # the heads of one device, but all rows, as in the mask
        q_rows, k_rows = (x.update(shape=(q.shape[0], *x.shape[1:])) for x in parts)
        tiles, skipped = _pallas().describe(mask, q_rows, k_rows, **_kernels(name))
    elif name == "xla":
        size, count = xla.slices(batch, t, num_heads, s)
        tiles = f"{count} slice{'s' if count > 1 else ''} of {size} queries x {s} keys"
    elif name == "eager":
        tiles = f"none, the whole {t} x {s} matrix"
    else:
        tiles, skipped = "chosen by cuDNN", None
    return Dispatch(
        impl=name,
        reason=reason,
        device=device.device_kind,
        tiles=tiles,
        mask=mask.kind,
        skipped=skipped,
    )


def _check_shapes(q: Shaped, k: Shaped, v: Shaped, mask: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4:
            raise ValueError(f"{name} has shape {x.shape}, must have 4 axes: batch, pos, head, dim")
    if not isinstance(mask, Mask):
        raise TypeError(f"mask is a {type(mask).__name__}, must be a jaxattn.Mask or None (causal)")
    (batch, t, num_heads, head_dim), (_, s, num_kv_heads, _) = q.shape, k.shape
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q {q.shape} and k {k.shape} must have no empty axis")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}, must be k's {k.shape}")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and head dim")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads must be a multiple of {num_kv_heads} kv heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; must be one")
    if q.dtype not in DTYPES:
        raise ValueError(f"q, k, v have dtype {q.dtype}, must be bfloat16, float16 or float32")
    mask.validate(batch, t, s)


def _number(scale: Any) -> float:
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a finite number, not a traced array")
    return float(scale)


def _choose(
    device: jax.Device | DeviceSpec, q: Shaped, scale: float | None
) -> tuple[Implementation, str]:
    """Select the implementation for "auto", with the reason."""
    if device.platform != "gpu":
        return "xla", f"auto: a {device.platform} device, where the kernels cannot run"
    name = _pallas_on(device)
    why_not = _pallas().why_not(device, q, scale, family=_family_on(name, device))
    if why_not:
        return "xla", f"auto: pallas cannot: {why_not}"
    return name, f"auto: {_pallas().architecture(device)}"


def _pallas_on(device: jax.Device | DeviceSpec) -> Implementation:
    """Return the implementation that `impl="pallas"` selects on a device."""
    op = _pallas()
    capability = op.capability_of(device)
    only_mma = op.runs_on("mma", capability) and not op.runs_on("wgmma", capability)
    return "pallas_mma" if only_mma else "pallas"


def _family_on(name: str, device: jax.Device | DeviceSpec) -> str:
    """Return the kernels of an implementation; on a GPU without any, those of the most GPUs."""
    op = _pallas()
    on_wgmma = op.runs_on("wgmma", op.capability_of(device))
    return "wgmma" if name == "pallas" and on_wgmma else "mma"


def _kernels(name: str) -> dict[str, str]:
    """Return the options of `pallas` functions for an implementation on the default device."""
    capability = _pallas().capability_of(hardware.default_device())
    return {"family": FAMILIES[name], "capability": capability}


def _why_not(
    name: Implementation,
    device: jax.Device | DeviceSpec,
    q: Shaped,
    k: Shaped,
    scale: float | None,
) -> str | None:
    """Return the reason why an implementation cannot run, or None."""
    if name in FAMILIES:
        why = _pallas().why_not(device, q, scale, family=_family_on(name, device))
        return why and f"{why}; use impl='xla', which runs everywhere"
    if name == "xla" and device.platform == "cpu" and q.dtype == jnp.float16:
        return "jax.nn takes no float16 on a CPU; use bfloat16 or float32, or impl='eager'"
    if name == "eager":
        batch, t, num_heads = sharded.local(q, k)[0].shape[:3]
        need = eager.score_bytes(batch, t, k.shape[1], num_heads)
        have = hardware.device_memory(device)
        if need > have:
            return (
                f"the score matrix of {t} x {k.shape[1]} tokens would need {need / 2**30:.0f} GiB "
                f"a layer, this device has {have / 2**30:.0f} GiB; use impl='pallas' or impl='xla'"
            )
    return None
