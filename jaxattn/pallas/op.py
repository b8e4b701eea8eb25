"""Differentiable attention on the kernels: memory layout, block maps, residuals.

B batch, T query pos, S key pos, N query heads, K kv heads, H head dim; R = B * T, C = B * S.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxattn import block_map
from jaxattn.block_map import BlockMap, WorkField
from jaxattn.device import DeviceSpec
from jaxattn.mask import Mask, Shaped
from jaxattn.pallas.mma import backward as mma_backward
from jaxattn.pallas.mma import dq_kernel as mma_dq_kernel
from jaxattn.pallas.mma import forward as mma_forward
from jaxattn.pallas.mma import tiles as mma_tiles
from jaxattn.pallas.operands import BackwardOperands, Operands
from jaxattn.pallas.softmax import LOG2E
from jaxattn.pallas.tile_scheduler import backward_order
from jaxattn.pallas.tiles import CHIPS, Tiles
from jaxattn.pallas.wgmma import tiles as wgmma_tiles
from jaxattn.pallas.wgmma.backward import dq_kernel
from jaxattn.pallas.wgmma.backward import kernel as backward_kernel
from jaxattn.pallas.wgmma.forward import kernel as forward_kernel
from jaxattn.pallas.wgmma.forward.context import SHORT_KV

HEAD_DIMS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
# Names of the forward kernel's results for remat policies: with both saved, the backward pass
# under jax.checkpoint does not run the forward kernel a second time.
OUT_NAME, LSE_NAME = "attn_out", "attn_lse"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Kernels of one matrix instruction.

    All kernels take (operands, work, *, scale, tiles): `Operands` or `BackwardOperands`, the block
    map for these tiles, the factor on the scores, above 0, and their part of `Tiles`. The backward
    kernel also takes `Plan.order`.

    Attributes:
      capabilities: compute capabilities that they run on.
      gpus: these GPUs in words.
      forward: from a `query_map`, returns o [R, N, H] in the dtype of q, and the log-sum-exp of the
        scaled scores in units of log 2, fp32 [N, R rounded up to a row tile]; +inf for rows that
        see nothing, whose o is 0.
      backward: from a `key_map`, returns dq (None without `with_dq`), dk and dv in the dtype of q.
        dk and dv are the same bits in every run; dq is summed in fp32 in the order in which
        programs finish, so its last bits may differ.
      query_gradient: from a `query_map`, returns dq, the same bits in every run: one program sums
        each dq in fp32, over the key tiles in their order.
      short_kv: keys of the last tile if fewer suffice; None: it is as long as the others.
    """

    capabilities: tuple[str, ...]
    gpus: str
    forward: Callable
    backward: Callable
    query_gradient: Callable
    short_kv: int | None


FAMILIES: Mapping[str, Family] = {
    "wgmma": Family(
        capabilities=("9.0",),
        gpus="Hopper GPUs (H100, H200; sm_90)",
        forward=forward_kernel.forward,
        backward=backward_kernel.backward,
        query_gradient=dq_kernel.query_gradient,
        short_kv=SHORT_KV,
    ),
    "mma": Family(
        capabilities=tuple(CHIPS),
        gpus="Ampere, Ada, Hopper and Blackwell workstation GPUs "
        "(sm_80, sm_86, sm_89, sm_90, sm_120)",
        forward=mma_forward.forward,
        backward=mma_backward.backward,
        query_gradient=mma_dq_kernel.query_gradient,
        short_kv=None,
    ),
}


# jax rebuilds it with placeholders in place of block maps, which type checkers must let pass.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Tile metadata of the kernels for the batch of one mask.

    Attributes:
      queries: block map of the forward kernel.
      keys: block map of the backward kernel.
      order: work tile of each program of the backward kernel, see `backward_order`.
      dq: block map of the dq kernel of the deterministic backward; None: the same as `queries`.
      tiles: the tile sizes of the block maps.
      problem: the shapes and the kind of mask of the block maps, see `_problem`.
    """

    queries: BlockMap
    keys: BlockMap
    order: Int[Array, " programs"]
    dq: BlockMap | None
    tiles: Tiles = dataclasses.field(metadata={"static": True})
    problem: str = dataclasses.field(metadata={"static": True})


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
    family: str = "wgmma",
    capability: str = "9.0",
    deterministic: bool = False,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Compute block-sparse flash attention: work proportional to the visible tiles of the mask.

    Memory is O(T). The log-sum-exp (4 bytes per query and head) is kept for the backward pass. The
    backward pass needs dq in fp32 (4 * H bytes per query and head), except the deterministic one.
    Args and Returns: see `jaxattn.attention`; `family` is a key of `FAMILIES`, `capability` the
    compute capability of the device.

    Raises:
      ValueError: mask.plan was prepared for other shapes, heads, or another kind of mask.

    References:
      Dao 2023, arXiv:2307.08691 (FlashAttention-2); Shah et al. 2024, arXiv:2407.08608
      (FlashAttention-3).
    """
    plan = mask.plan
    if plan is None:
        plan = prepare(mask, q_BTNH, k_BSKH, family=family, capability=capability).plan
    problem = _problem(mask, q_BTNH, k_BSKH, family)
    if plan.problem != problem:
        raise ValueError(
            f"mask.plan was prepared for {plan.problem}, not {problem}: call jaxattn.prepare again"
        )
    B, T, N, H = q_BTNH.shape
    length, kv_length = (block_map.stride(mask, x.shape[1]) for x in (q_BTNH, k_BSKH))
    merged = [_merge_rows(q_BTNH, length), *(_merge_rows(x, kv_length) for x in (k_BSKH, v_BSKH))]
    o_RNH, lse_NR = _flash(*merged, plan, scale, deterministic)
    o_BTNH = o_RNH[: B * length].reshape(B, length, N, H)[:, :T]
    if not return_lse:
        return o_BTNH
    # The kernels mark a row that sees nothing by +inf; its sum of exponentials is 0.
    lse_NR = jnp.where(lse_NR == jnp.inf, -jnp.inf, lse_NR / LOG2E)
    return o_BTNH, lse_NR[:, : B * length].T.reshape(B, length, N)[:, :T]


def prepare(
    mask: Mask, q: Shaped, k: Shaped, *, family: str = "wgmma", capability: str = "9.0"
) -> Mask:
    """Return the mask with the tile metadata of the kernels in `plan`."""
    heads = q.shape[2], k.shape[2], q.shape[3]
    if family == "mma":
        return planned(mask, q, k, mma_tiles.choose_tiles(*heads, capability))
    return planned(mask, q, k, wgmma_tiles.choose_tiles(*heads))


def planned(mask: Mask, q: Shaped, k: Shaped, tiles: Tiles) -> Mask:
    """Do `prepare` for given tile sizes."""
    sizes = q.shape[0], q.shape[1], k.shape[1]
    problem = _problem(mask, q, k, tiles.family)
    return dataclasses.replace(mask, plan=_plan(mask, sizes, k.shape[2], tiles, problem))


def describe(
    mask: Mask, q: Shaped, k: Shaped, *, family: str = "wgmma", capability: str = "9.0"
) -> tuple[str, float]:
    """Return the tiles in words, and the fraction of the score matrix that the forward skips."""
    batch, t, num_heads = q.shape[:3]
    plan = prepare(mask, q, k, family=family, capability=capability).plan
    work, fwd = plan.queries.work, plan.tiles.forward
    short_kv = FAMILIES[family].short_kv
    before_last = (work[..., WorkField.LIVE_TO] - 1) * fwd.block_kv
    last = fwd.block_kv
    if short_kv is not None:
        short = work[..., WorkField.LIVE_COLUMNS] - before_last <= short_kv
        last = jnp.where(short, short_kv, fwd.block_kv)
    visited = before_last + last - work[..., WorkField.LIVE_FROM] * fwd.block_kv
    total = (batch * t / fwd.tiling.group_rows) * k.shape[1]
    return str(plan.tiles), max(0.0, 1.0 - float(visited.sum()) / total)


def capability_of(device: jax.Device | DeviceSpec) -> str:
    """Return the compute capability of a device; "" if the device has none."""
    return str(getattr(device, "compute_capability", ""))


def runs_on(family: str, capability: str) -> bool:
    """Return True if the kernels of a family run on GPUs of a compute capability."""
    return capability in FAMILIES[family].capabilities


def architecture(device: jax.Device | DeviceSpec) -> str:
    """Return the architecture of a GPU that the kernels run on, in words."""
    return CHIPS[capability_of(device)].name


def why_not(
    device: jax.Device | DeviceSpec, q: Shaped, scale: float | None = None, *, family: str = "wgmma"
) -> str | None:
    """Return the reason why the kernels of a family cannot run on this device, or None.

    The scale (None: the default) must be above 0, because the kernels take the maximum of scores
    before scaling.
    """
    capability = capability_of(device)
    if device.platform != "gpu" or not runs_on(family, capability):
        gpus = FAMILIES[family].gpus
        sm = f" (sm_{capability.replace('.', '')})" if device.platform == "gpu" else ""
        return f"its kernels are for {gpus}, this device is: {device.device_kind}{sm}"
    if jax.config.jax_enable_x64:
        return "its kernels count in 32 bits, and jax_enable_x64 is on: turn that off"
    if q.dtype not in DTYPES:
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"it takes head_dim {' or '.join(map(str, HEAD_DIMS))}, not {q.shape[-1]}"
    if scale is not None and not scale > 0:
        return f"it takes scale > 0, not {scale}"
    return None


def _problem(mask: Mask, q: Shaped, k: Shaped, family: str) -> str:
    """Return the shapes, the kind of mask and the kernels that a plan depends on, in words."""
    sizes = f"q {list(q.shape[:3])}, k {list(k.shape[:3])} (batch, tokens, heads)"
    return f"{sizes}, a mask that is {mask.kind}, {family} kernels"


@functools.partial(
    jax.jit, static_argnums=(1, 2, 3, 4)
)  # one compilation, not 50, outside a jit too
def _plan(
    mask: Mask, sizes: tuple[int, int, int], kv_heads: int, tiles: Tiles, problem: str
) -> Plan:
    fwd, bwd, dq = (part.tiling for part in (tiles.forward, tiles.backward, tiles.dq))
    keys = block_map.key_map(mask, *sizes, bwd)
    return Plan(
        queries=block_map.query_map(mask, *sizes, fwd),
        keys=keys,
        order=backward_order(keys, kv_heads),
        dq=None if dq == fwd else block_map.query_map(mask, *sizes, dq),
        tiles=tiles,
        problem=problem,
    )


def _merge_rows(x: Array, length: int) -> Array:
    """Reshape [B, T, heads, H] to [B * length, heads, H], padded to the 8 rows of TMA."""
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
    x = x.reshape(-1, *x.shape[2:])
    return jnp.pad(x, ((0, -x.shape[0] % block_map.ALIGN), (0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash(q_RNH, k_CKH, v_CKH, plan: Plan, scale: float, deterministic: bool):
    """Return the output, and the log-sum-exp in units of log 2, padded to whole row tiles."""
    return _flash_forward(q_RNH, k_CKH, v_CKH, plan, scale, deterministic)[0]


def _flash_forward(q_RNH, k_CKH, v_CKH, plan: Plan, scale: float, deterministic: bool):
    operands = Operands(q_RNH=q_RNH, k_CKH=k_CKH, v_CKH=v_CKH)
    o_RNH, lse_NR = FAMILIES[plan.tiles.family].forward(
        operands, plan.queries, scale=scale, tiles=plan.tiles.forward
    )
    # Under a scan that saves both, XLA fuses the kernel with the writes into the stacked residuals,
    # and runs the kernel a second time for other readers of o. The barrier prevents the fusion.
    o_RNH, lse_NR = lax.optimization_barrier((o_RNH, lse_NR))
    o_RNH = checkpoint_name(o_RNH, OUT_NAME)
    lse_NR = checkpoint_name(lse_NR, LSE_NAME)
    return (o_RNH, lse_NR), (q_RNH, k_CKH, v_CKH, o_RNH, lse_NR, plan)


def _flash_backward(scale: float, deterministic: bool, residuals, gradients):
    q_RNH, k_CKH, v_CKH, o_RNH, lse_NR, plan = residuals
    do_RNH, dlse_NR = gradients
    # d(softmax) needs sum over keys of p * dp, which is sum over H of o * do.
    # A product and a sum, not an einsum: XLA fuses them into one pass. An einsum becomes N * R
    # small matrix products (measured: 0.6 to 3 ms more on 32k tokens of 32 to 48 heads).
    delta_RN = (o_RNH.astype(jnp.float32) * do_RNH.astype(jnp.float32)).sum(axis=2)
    delta_NR = delta_RN.T
    delta_NR = jnp.pad(delta_NR, ((0, 0), (0, lse_NR.shape[1] - delta_NR.shape[1])))
    # d lse / d s = p: the gradient of the log-sum-exp joins dp in p * (dp - delta). If the
    # log-sum-exp is unused, its gradient is a constant 0, which XLA folds away.
    delta_NR = delta_NR - dlse_NR * LOG2E
    operands = BackwardOperands(
        q_RNH=q_RNH, k_CKH=k_CKH, v_CKH=v_CKH, do_RNH=do_RNH, lse_NR=lse_NR, delta_NR=delta_NR
    )
    tiles = plan.tiles
    family = FAMILIES[tiles.family]
    options = {"scale": scale, "tiles": tiles.backward, "with_dq": not deterministic}
    dq_RNH, dk_CKH, dv_CKH = family.backward(operands, plan.keys, plan.order, **options)
    if deterministic:
        work = plan.queries if plan.dq is None else plan.dq
        dq_RNH = family.query_gradient(operands, work, scale=scale, tiles=tiles.dq)
    return dq_RNH, dk_CKH, dv_CKH, None


_flash.defvjp(_flash_forward, _flash_backward)
