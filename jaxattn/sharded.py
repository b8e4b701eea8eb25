"""Attention under an explicit mesh: each device computes its own rows and heads.

Where batch and heads are sharded there is no communication: the keys of a query are in its own
batch row and group of heads. Where positions are sharded too, all-to-alls exchange positions for
heads: a device gives away the other devices' heads of its positions, and gets all positions of its
own heads. It attends with whole rows, under any mask, and a second exchange takes the output back.
All devices do the same work, whatever documents the mask has.

B batch, T query pos, S key pos, N query heads, K kv heads, H head dim.

References:
  Jacobs et al. 2023, arXiv:2309.14509, section 3 (DeepSpeed-Ulysses: the exchange).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxattn.mask import Mask, Shaped

QKV_NAME = "attn_qkv"
"""Name of q, k and v for remat policies, after the exchange of positions for heads."""


def local(q: Shaped, k: Shaped) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Return the shapes of q [B, T, N, H] and k [B, S, K, H] on one device, of the largest part.

    Raises:
      ValueError: positions are sharded, and heads or positions do not divide.
    """
    over, copies = _exchange(q, k)

    def part(x: Shaped, copies: int) -> jax.ShapeDtypeStruct:
        rows, _, heads, dim = _spec(x)
        shards = (rows, (), (*_names(heads), *over), dim)
        shape = (*x.shape[:2], x.shape[2] * copies, x.shape[3])
        sizes = (-(-n // _devices(s)) for n, s in zip(shape, shards, strict=True))
        return jax.ShapeDtypeStruct(tuple(sizes), x.dtype)

    return part(q, 1), part(k, copies)


def plan_rows(plan: Callable[[Mask], Any], q: Shaped, mask: Mask) -> Mask:
    """Add the tile metadata of each device's rows to a mask, concatenated over devices.

    q is [B, T, N, H]. `plan` computes the metadata of one device's rows. On each device, the mask
    that is returned has the ids of whole rows.

    Raises:
      ValueError: the sharding of the mask is not that of the rows.
    """
    if not _is_sharded():
        return dataclasses.replace(mask, plan=plan(mask))
    mask = _whole_rows(mask, q)
    rows = PartitionSpec(_spec(q)[0])
    specs = _mask_spec(mask, rows)
    run = jax.shard_map(plan, in_specs=(specs,), out_specs=rows, check_vma=False)
    return dataclasses.replace(mask, plan=run(mask))


def run_on_parts(
    run: Callable[..., Any], q: Array, k: Array, v: Array, mask: Mask, *, return_lse: bool
) -> Any:
    """Run `run` on each device's rows and heads; directly without an explicit mesh.

    `run` maps q [B, T, N, H], k and v [B, S, K, H] and the mask to the output [B, T, N, H], with
    `return_lse` also to the log-sum-exp [B, T, N].

    Raises:
      ValueError: the head dim is sharded, heads or positions do not divide, or the shardings of k,
        v or the mask are not that of q.
    """
    if not _is_sharded():
        return run(*checkpoint_name((q, k, v), QKV_NAME), mask)
    spec = _spec(q)
    if spec[3] is not None:
        raise ValueError(f"q is sharded {spec}; only batch, positions and heads may be sharded")
    for name, x in (("k", k), ("v", v)):
        if _spec(x) != spec:
            raise ValueError(f"{name} is sharded {_spec(x)}, must be as q: {spec}")
    over, copies = _exchange(q, k)

    def run_on_part(q: Array, k: Array, v: Array, mask: Mask) -> Any:
        if copies > 1:
            k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        q, k, v = (_move(x, over, split=2, join=1) for x in (q, k, v))
        results = run(*checkpoint_name((q, k, v), QKV_NAME), mask)
        return jax.tree.map(lambda x: _move(x, over, split=1, join=2), results)

    mask = _whole_rows(mask, q)
    in_specs = (spec, spec, spec, _mask_spec(mask, PartitionSpec(spec[0])))
    out_specs = (spec, PartitionSpec(*spec[:3])) if return_lse else spec
    parts = jax.shard_map(run_on_part, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return parts(q, k, v, mask)


def _exchange(q: Shaped, k: Shaped) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes that positions are exchanged over, and the copies of each kv head.

    Query heads are dealt out in their order, first over the axes that shard heads, then over those
    that shard positions. A kv head is copied where its query heads are on several devices, so that
    each of them has the kv heads that its query heads use, in groups of one size.

    Raises:
      ValueError: heads or positions do not divide.
    """
    if not _is_sharded() or not (over := _names(_spec(q)[1])):
        return (), 1
    num_heads, parts, with_heads = q.shape[2], _devices(over), _devices(_spec(q)[2])
    for name, length in (("T", q.shape[1]), ("S", k.shape[1])):
        if length % parts:
            raise ValueError(
                f"{name}={length} positions must be a multiple of the {parts} devices that they "
                f"are sharded over (mesh axes {', '.join(over)})"
            )
    if num_heads % (parts * with_heads):
        raise ValueError(
            f"{num_heads} query heads must be a multiple of {parts * with_heads}: positions are "
            f"sharded over {parts} devices, and attention exchanges them for heads"
            + (f", which are sharded over {with_heads}" if with_heads > 1 else "")
        )
    return over, kv_copies(num_heads, k.shape[2], parts * with_heads)


def _move(x: Array, over: tuple[str, ...], *, split: int, join: int) -> Array:
    """Exchange parts of axis `split` over devices, and join the received parts along axis `join`.

    The parts are an axis of their own, the first one: of one row it is next to T in memory, so that
    only the heads' side of an exchange is transposed. `jax.lax.all_to_all` of two other axes makes
    XLA transpose both sides (jax 0.12).
    """
    if not over:
        return x
    n = _devices(over)
    parts = x.reshape(*x.shape[:split], n, x.shape[split] // n, *x.shape[split + 1 :])
    parts = jnp.moveaxis(parts, split, 0)
    parts = jax.lax.all_to_all(parts, over, split_axis=0, concat_axis=0, tiled=True)
    parts = jnp.moveaxis(parts, 0, join)
    return parts.reshape(*parts.shape[:join], -1, *parts.shape[join + 2 :])


def kv_copies(num_heads: int, num_kv_heads: int, devices: int) -> int:
    """Return how often each kv head is repeated so that the heads can be dealt out to devices.

    num_heads is a multiple of num_kv_heads and of the devices that share the heads of a row.
    """
    group = num_heads // num_kv_heads
    return group // math.gcd(group, num_heads // devices)


def _is_sharded() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and bool(mesh.explicit_axes)


def _spec(x: Shaped) -> PartitionSpec:
    """Return the sharding of x over the explicit mesh."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else getattr(x, "sharding", None)
    spec = getattr(sharding, "spec", None) or PartitionSpec()
    return PartitionSpec(*spec, *[None] * (len(x.shape) - len(spec)))


def _names(axes: Any) -> tuple[str, ...]:
    """Return the mesh axes of an entry of a PartitionSpec."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _devices(axes: Any) -> int:
    """Return the number of devices along axes of the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in _names(axes))


def _whole_rows(mask: Mask, q: Shaped) -> Mask:
    """Gather ids that are sharded over the positions of q: every device attends with whole rows."""
    rows, positions = _spec(q)[:2]
    split, whole = PartitionSpec(rows, positions), PartitionSpec(rows, None)

    def gather(ids: Array | None) -> Array | None:
        if ids is None or positions is None or _spec(ids) != split:
            return ids
        return jax.sharding.reshard(ids, whole)

    return dataclasses.replace(
        mask,
        segment_ids=gather(mask.segment_ids),
        kv_segment_ids=gather(mask.kv_segment_ids),
    )


def _mask_spec(mask: Mask, rows: PartitionSpec) -> Mask:
    """Return the sharding of a mask: by batch rows; a block pattern for all rows is replicated.

    Raises:
      ValueError: ids or blocks have another sharding.
    """
    specs = jax.tree.map(lambda _: rows, mask)
    if mask.blocks is not None and mask.blocks.ndim == 2:
        specs = dataclasses.replace(specs, blocks=PartitionSpec())
    for name in ("segment_ids", "kv_segment_ids", "blocks"):
        x = getattr(mask, name)
        if x is None:
            continue
        for_all = name == "blocks" and x.ndim == 2
        wanted = PartitionSpec(None if for_all else rows[0], *[None] * (x.ndim - 1))
        if _spec(x) != wanted:
            raise ValueError(f"{name} is sharded {_spec(x)}, must be {wanted}; see jax.reshard")
    return specs
