"""Attention under an explicit mesh: each device computes its own rows and heads.

There is no communication: the keys of a query are in its own batch row and group of heads.
B batch, T query pos, S key pos, N query heads, K kv heads, H head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxattn.mask import Mask, Shaped


def local(x: Shaped) -> jax.ShapeDtypeStruct:
    """Return the shape of one device's part of x under the explicit mesh; the largest part."""
    mesh = jax.sharding.get_abstract_mesh()
    shape = list(x.shape)
    for i, axes in enumerate(_spec(x) if not mesh.empty else ()):
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            shape[i] = -(-shape[i] // mesh.shape[axis])
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def plan_rows(plan: Callable[[Mask], Any], q: Shaped, mask: Mask) -> Any:
    """Compute the tile metadata of each device's rows; the results are concatenated over devices.

    Args:
      plan: computes the tile metadata of one device's rows.
      q: queries [B, T, N, H].
      mask: mask of all rows.

    Raises:
      ValueError: the sharding of the mask is not that of the rows.
    """
    if not _is_sharded():
        return plan(mask)
    rows = PartitionSpec(_spec(q)[0])
    specs = _mask_spec(mask, rows)
    return jax.shard_map(plan, in_specs=(specs,), out_specs=rows, check_vma=False)(mask)


def run_on_parts(
    run: Callable[..., Any], q: Array, k: Array, v: Array, mask: Mask, *, return_lse: bool
) -> Any:
    """Run `run` on each device's rows and heads; directly without an explicit mesh.

    Args:
      run: (q, k, v, mask) -> out [B, T, N, H], with `return_lse` also the log-sum-exp [B, T, N].
      q: queries [B, T, N, H].
      k: keys [B, S, K, H].
      v: values [B, S, K, H].
      mask: mask of all rows.
      return_lse: True if `run` returns both.

    Raises:
      ValueError: positions or the head dim are sharded, or the shardings of k, v or the mask are
        not that of q.
    """
    if not _is_sharded():
        return run(q, k, v, mask)
    spec = _spec(q)
    if spec[1] is not None or spec[3] is not None:
        raise ValueError(f"q is sharded {spec}; only batch and heads may be sharded")
    for name, x in (("k", k), ("v", v)):
        if _spec(x) != spec:
            raise ValueError(f"{name} is sharded {_spec(x)}, must be as q: {spec}")
    in_specs = (spec, spec, spec, _mask_spec(mask, PartitionSpec(spec[0])))
    out_specs = (spec, PartitionSpec(*spec[:3])) if return_lse else spec
    parts = jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return parts(q, k, v, mask)


def _is_sharded() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and bool(mesh.explicit_axes)


def _spec(x: Shaped) -> PartitionSpec:
    """Return the sharding of x over the explicit mesh."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else getattr(x, "sharding", None)
    spec = getattr(sharding, "spec", None) or PartitionSpec()
    return PartitionSpec(*spec, *[None] * (len(x.shape) - len(spec)))


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
