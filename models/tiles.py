"""Tiles of tokens: apply a function of single tokens to one tile of every row after another.

Attention is the only part of a block that looks at other tokens. The products of a block need
much memory for each token (SwiGLU alone six arrays of width F). Tiled, they need the memory of one
tile, forward and backward, however long the row is.

The gradient of a weight sums over tokens. Each tile's part leaves a matrix product in the compute
dtype, as the gradient of a whole row does; the parts are summed in float32 and rounded once. With
bfloat16 the sum has about the error of one rounding more than the whole product; a sum in bfloat16
would lose the parts of later tiles.

B batch, T token pos, C token pos in a tile.

References:
  Bekman et al. 2025, arXiv:2506.13996 ("Arctic Long Sequence Training"), on sequence tiling.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Function = Callable[[Any, Any, Any, Any], Any]
"""(trained weights, frozen weights, random keys, arrays [B, C, ...]) -> arrays [B, C, ...]."""


def divides(tokens: int, tile_size: int) -> bool:
    """Return whether a row has tiles of at most tile_size tokens, and at least a quarter of it."""
    return _count(tokens, tile_size) is not None


def tile_count(tokens: int, tile_size: int | None) -> int:
    """Return the number of tiles of a row: the least that divides it into at most tile_size tokens.

    `tokens` are those of a row on one device. Without a tile_size there is one tile.

    Raises:
      ValueError: only tiles of less than a quarter of tile_size divide the row.
    """
    count = 1 if tile_size is None else _count(tokens, tile_size)
    if count is None:
        raise ValueError(
            f"tile_size={tile_size} does not divide a row of {tokens:,} tokens, nor does a size "
            f"down to a quarter of it: take rows of a multiple of {tile_size:,} tokens"
        )
    return count


def _count(tokens: int, tile_size: int) -> int | None:
    least = -(-tokens // tile_size)
    return next((n for n in range(least, 4 * least + 1) if tokens % n == 0), None)


def over_tiles(
    function: Function, trained: Any, frozen: Any, keys: Any, xs: Any, *, tile_size: int | None
) -> Any:
    """Apply a function to tiles of T, forward and backward.

    Values inside the function need the memory of one tile. The backward pass computes each tile
    again: policies of `models.remat` see nothing inside. Under a mesh that splits T, a tile is made
    of neighboring tokens of every device.

    Args:
      function: see `Function`; captures no array.
      trained: weights that get a gradient.
      frozen: weights that get none.
      keys: tree of random keys, from which each tile gets keys of its own.
      xs: tree of arrays [B, T, ...].
      tile_size: most tokens of a tile, for each device; None: one tile.

    Returns:
      Arrays [B, T, ...].

    Raises:
      ValueError: see `tile_count`.
    """
    first = jax.tree.leaves(xs)[0]
    count = tile_count(first.shape[1] // _shards(first), tile_size)
    if count == 1:
        return function(trained, frozen, keys, xs)
    return _over_tiles(function, count, trained, frozen, keys, xs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_tiles(function, count, trained, frozen, keys, xs):
    def body(nothing, keys, xs):
        return nothing, function(trained, frozen, keys, xs)

    return _loop(body, count, (), keys, (xs,), reuse=0)[1]


def _forward(function, count, trained, frozen, keys, xs):
    return _over_tiles(function, count, trained, frozen, keys, xs), (trained, frozen, keys, xs)


def _backward(function, count, residuals, gradients):
    trained, frozen, keys, xs = residuals

    def body(sums, keys, xs, dys):
        _, pull = jax.vjp(lambda w, xs: function(w, frozen, keys, xs), trained, xs)
        dw, dxs = pull(dys)
        return jax.tree.map(lambda s, g: s + g.astype(jnp.float32), sums, dw), dxs

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, dtype=jnp.float32), trained)
    sums, dxs = _loop(body, count, zeros, keys, (xs, gradients), reuse=1)
    return jax.tree.map(lambda s, w: s.astype(w.dtype), sums, trained), None, None, dxs


_over_tiles.defvjp(_forward, _backward)


def _loop(body, count, carry, keys, inputs, *, reuse):
    """Run (carry, results) = body(carry, keys, *inputs) over all tiles.

    Results are written over those leaves of inputs[reuse] that have their shape, the others to
    memory of their own. `lax.scan` would share zeros between all loops, filled once before the
    first, and copy them for each (jax 0.12.0, by the compiler's count: 5 GiB at 7B and 262,144
    tokens).
    """
    # Results of this loop depend on its inputs, so that their memory is not filled any earlier.
    inputs, zero = jax.lax.optimization_barrier((inputs, jnp.int32(0)))
    leaves, tree = jax.tree.flatten(jax.tree.map(_by_device, inputs))
    keys = jax.tree.map(lambda key: jax.random.split(key, count), keys)

    def at(i, carry, leaves):
        own = jax.tree.map(lambda key: key[i], keys)
        tiles = tree.unflatten([_tile(x, i, count) for x in leaves])
        carry, results = body(carry, own, *tiles)
        return carry, jax.tree.map(_by_device, results)

    results, tree_of_results = jax.tree.flatten(jax.eval_shape(at, 0, carry, leaves)[1])
    start = len(jax.tree.leaves(inputs[:reuse]))
    reusable = list(range(start, start + len(jax.tree.leaves(inputs[reuse]))))
    buffers, place_of = [], {}
    for n, result in enumerate(results):
        shape = result.shape[:2] + (result.shape[2] * count,) + result.shape[3:]
        same = [i for i in reusable if (leaves[i].shape, leaves[i].dtype) == (shape, result.dtype)]
        if same:
            reusable.remove(same[0])
            place_of[same[0]] = n
            buffers.append(leaves[same[0]])
        else:
            buffers.append(_filled(zero.astype(result.dtype), shape, result))

    def step(i, state):
        carry, buffers = state
        current = [buffers[place_of[n]] if n in place_of else x for n, x in enumerate(leaves)]
        carry, results = at(i, carry, current)
        results = jax.tree.leaves(results)
        return carry, [_write(b, x, i) for b, x in zip(buffers, results, strict=True)]

    carry, buffers = jax.lax.fori_loop(0, count, step, (carry, buffers))
    return carry, tree_of_results.unflatten(map(_whole, buffers))


def _by_device(x):
    """Reshape [B, T, ...] to [B, S, T / S, ...]: the mesh splits S, and no tile crosses devices."""
    (B, T, *rest), shards = x.shape, _shards(x)
    return _reshape(x, (B, shards, T // shards, *rest), (0, 1, None, *range(2, x.ndim)))


def _whole(x):
    """Undo `_by_device`."""
    B, shards, T, *rest = x.shape
    return _reshape(x, (B, shards * T, *rest), (0, 1, *range(3, x.ndim)))


def _tile(x, i, count):
    """Return tile i of [B, S, T / S, ...]: [B, C, ...]."""
    size = x.shape[2] // count
    return _whole(jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2))


def _write(x, tile, i):
    """Return [B, S, T / S, ...] with tile i, [B, S, C / S, ...]."""
    return jax.lax.dynamic_update_slice_in_dim(x, tile, i * tile.shape[2], axis=2)


def _filled(value, shape, like):
    """Return an array of one value, with the sharding of `like`."""
    mesh = jax.sharding.get_abstract_mesh()
    place = None if mesh.empty else like.sharding
    return jax.lax.broadcast_in_dim(value, shape, (), out_sharding=place)


def _reshape(x, shape, axes):
    """Reshape an array; `axes` names for each new dimension the old one whose sharding it has."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return x.reshape(shape)
    old = jax.typeof(x).sharding.spec
    spec = P(*(None if a is None else old[a] for a in axes))
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(mesh, spec))


def _shards(x, axis=1) -> int:
    """Return the number of parts that the mesh splits an axis into."""
    place = jax.typeof(x).sharding
    entry = place.spec[axis] if place.spec else None
    names = entry if isinstance(entry, tuple) else (entry,)
    return math.prod(place.mesh.shape[name] for name in names if name is not None)
