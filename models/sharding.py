"""Sharding of weights and activations by logical axes; no other module names mesh axes.

Weights and activations name logical axes; `RULES` maps these to the axes of a mesh made of
"data", "fsdp", "seq" and "tensor" (any of them may be missing). Without a mesh every function here
is a no-op: the same model code runs on one device and on many.

Layout: the batch is split over data and fsdp together, the positions of its rows over seq; jaxattn
exchanges positions for heads around attention. Stored weights are split over fsdp and seq together
and gathered right before use (`gathered`). Heads, feed-forward and vocabulary columns stay split
over tensor in use.

References:
  Zhao et al. 2023, arXiv:2304.11277 (FSDP); Jacobs et al. 2023, arXiv:2309.14509 (sequence
  parallelism with sharded weights); Shoeybi et al. 2019, arXiv:1909.08053 (tensor parallel blocks);
  jax explicit sharding: docs.jax.dev/en/latest/notebooks/explicit-sharding.html
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Axes = tuple[str | None, ...]

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "seq": ("seq",),  # positions of activations, see `positions`
    "embed": ("fsdp", "seq"),  # model width of weights: split in storage, gathered for use
    "heads": ("tensor",),  # query heads, or kv heads with the query heads of their groups
    "ffn": ("tensor",),
    "vocab": ("tensor",),  # columns of the output matrix, logits
    # Columns of the embedding table. Not its rows: the lookup in a column slice is local, and any
    # vocabulary size divides.
    "table": ("tensor", "fsdp", "seq"),
    "table_in_use": ("tensor",),  # columns of the embeddings that were looked up
}
STORAGE_ONLY = ("fsdp", "seq")  # mesh axes that `gathered` removes from a weight


def spec(axes: Sequence[str | None], mesh: Mesh | AbstractMesh) -> P:
    """Return the PartitionSpec of an array with these logical axes, None for one that is not split.

    Axes that the mesh lacks, and axes with one device, split nothing.

    Raises:
      ValueError: a name is unknown, or two dimensions use one mesh axis.
    """
    if unknown := {a for a in axes if a is not None} - RULES.keys():
        raise ValueError(f"unknown logical axes {sorted(unknown)}: RULES has {sorted(RULES)}")
    # A mesh axis of size 1 splits nothing. Named in the type, it is lost by slices of a batch of
    # one row (jax 0.11, 0.12), and the next concatenation fails.
    sizes = mesh.shape
    entries = [tuple(m for m in RULES.get(a or "", ()) if sizes.get(m, 1) > 1) for a in axes]
    used = [m for entry in entries for m in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(axes)} put two dimensions on one mesh axis: {entries}")
    return P(*[e[0] if len(e) == 1 else (e or None) for e in entries])


def current_spec(axes: Sequence[str | None]) -> P | None:
    """Return `spec` of these axes on the current mesh; None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else spec(axes, mesh)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return a NamedSharding for every array of a tree that contains parameters.

    The tree is a model, its gradients, an optimizer state over it, or `jax.eval_shape` of those.
    Parameters have logical axes; any other leaf is replicated. The result is for
    `jit(out_shardings=...)`, `jax.device_put`, or the restore of a checkpoint.

    Raises:
      ValueError: dimensions do not divide by their mesh axes; the message names all of them.
    """
    problems: list[str] = []

    def one(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        name, value = jax.tree_util.keystr(path), leaf.get_value()
        axes = leaf.get_metadata().get("axes", ())
        # A quantized weight is several arrays, each of which has some of the weight's axes.
        of_arrays = value.axes_of(axes) if hasattr(value, "axes_of") else axes

        def place(array, axes):
            axes = (None,) * (len(array.shape) - len(axes)) + axes
            problems.extend(_indivisible(name, array.shape, axes, mesh))
            return NamedSharding(mesh, spec(axes, mesh))

        return leaf.replace(jax.tree.map(place, value, of_arrays))

    placed = jax.tree_util.tree_map_with_path(
        one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    if problems:
        raise ValueError("the mesh does not fit the model: " + "; ".join(problems))
    return placed


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Reshard an array by its logical axes.

    Raises:
      ValueError: a dimension does not divide by its mesh axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    if problems := _indivisible("array", x.shape, axes, mesh):
        raise ValueError("; ".join(problems))
    return jax.sharding.reshard(x, spec(axes, mesh))


def gathered(w: jax.Array, *axes: str | None) -> jax.Array:
    """All-gather a stored weight over fsdp and seq; the transpose reduce-scatters the gradient."""
    stored = current_spec(axes)
    return w if stored is None else jax.sharding.reshard(w, P(*map(_in_use, stored)))


def in_use(axes: Axes) -> Axes:
    """Return the logical axes of a weight, without those that split it only in storage."""
    return tuple(a if a and not set(RULES[a]) <= set(STORAGE_ONLY) else None for a in axes)


def einsum(subscripts: str, *operands: jax.Array, out: Axes, **kwargs) -> jax.Array:
    """Compute `jnp.einsum` with the logical axes `out`; needed where it contracts a split axis."""
    return jnp.einsum(subscripts, *operands, out_sharding=current_spec(out), **kwargs)


def take_rows(table: jax.Array, ids: jax.Array | np.ndarray, *axes: str | None) -> jax.Array:
    """Look up table[ids], sharded by the logical axes of the result."""
    return table.at[ids].get(mode="clip", out_sharding=current_spec(axes))


def reshape(x: jax.Array, shape: Sequence[int], *axes: str | None) -> jax.Array:
    """Reshape x, sharded by the logical axes of the result."""
    return jnp.reshape(x, shape, out_sharding=current_spec(axes))


def struct(shape: Sequence[int], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    """Return a ShapeDtypeStruct, with the sharding on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(axes, mesh)))


def mesh_of(weight: jax.Array) -> contextlib.AbstractContextManager:
    """Make the mesh of a weight current inside the context, unless the caller has set a mesh."""
    mesh = jax.typeof(weight).sharding.mesh
    if mesh.empty or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def positions(x: jax.Array) -> str | None:
    """Return the logical axis of T of activations [B, T, ...]: one position (decoding) has none."""
    return "seq" if x.shape[1] > 1 else None


def multiple(axis: str, weight: jax.Array) -> int:
    """Return the number that a dimension of this axis must be a multiple of, on a weight's mesh."""
    mesh = jax.typeof(weight).sharding.mesh
    return math.prod(mesh.shape[m] for m in RULES[axis] if m in mesh.axis_names)


def _in_use(entry: Any) -> Any:
    """Remove the mesh axes that split weights only in storage from a PartitionSpec entry."""
    names = entry if isinstance(entry, tuple) else (entry,)
    kept = tuple(n for n in names if n is not None and n not in STORAGE_ONLY)
    return kept[0] if len(kept) == 1 else (kept or None)


def _indivisible(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh
) -> list[str]:
    """Return one sentence for each dimension that the mesh cannot split evenly."""
    problems = []
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        used = [m for m in RULES.get(axis or "", ()) if m in mesh.axis_names]
        parts = math.prod(mesh.shape[m] for m in used)
        if size % parts:
            largest = max(used, key=lambda m: mesh.shape[m])
            problems.append(
                f"{name} has size {size} in dimension {dim} ({axis}), which must be a multiple of "
                f"{parts} = mesh axes {'*'.join(used)}: use a smaller {largest!r} axis"
            )
    return problems
