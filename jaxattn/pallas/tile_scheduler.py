"""Tile schedulers: which work tile a program computes, and in which order they run.

A work tile is a row tile of the work list and a head.

`persistent_schedule` gives each program of a persistent grid its work tiles (forward kernel). It is
computed while tracing, from counts alone: the work list is sorted by falling work, so a tile's
index in it is enough.

`backward_order` orders the programs of a grid in which each has one work tile (backward kernel). It
depends on the documents, so it is part of the metadata of a mask.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxattn.block_map import BlockMap, WorkField

# The first programs take one in so many row tiles of the last head. Measured alike: 4 and 8.
EARLY = 8


def persistent_schedule(row_tiles: int, heads: int, programs: int) -> np.ndarray:
    """Return the work tiles of every program, in order.

    Heads are taken one after another, so that the programs read the K and V of one or two heads
    at a time and find them in the L2 cache. Within a head the sorted row tiles are dealt in
    rounds, every second round backwards: the program with the longest tile of one round gets the
    shortest of the next. The remaining imbalance is the same in every head, so each head starts
    at another program, which evens it out. (The largest load over the mean on 132
    programs, computed for the benchmark's shapes: 1.000 to 1.013; without the rotation up to
    1.24, for a causal row of 32k tokens with the heads of 1.8B.)

    Args:
      row_tiles: length of the work list.
      heads: heads that each row tile is processed for.
      programs: programs of the grid, at most row_tiles * heads.

    Returns:
      int32 [programs, 1 + most work tiles of a program]: the number of work tiles, then each as
      head * row_tiles + index in the work list; the last work tile pads a row.
    """
    head, index = np.divmod(np.arange(row_tiles * heads), row_tiles)
    if row_tiles < programs:  # not even one round in a head: deal out all heads in one go
        program = np.arange(row_tiles * heads) % programs
    else:
        deal, program = np.divmod(index, programs)
        program = np.where(deal % 2 == 1, programs - 1 - program, program)
        program = (program + head * programs // heads) % programs
    count = np.bincount(program, minlength=programs)
    order = np.argsort(program, kind="stable")  # by program; within a program, by head and index
    turn = np.arange(order.size) - np.repeat(np.cumsum(count) - count, count)
    schedule = np.zeros((programs, 1 + count.max()), np.int32)
    schedule[:, 0] = count
    schedule[program[order], 1 + turn] = order
    last = schedule[np.arange(programs), count]
    beyond = np.arange(schedule.shape[1]) > count[:, None]
    return np.where(beyond, last[:, None], schedule).astype(np.int32)


def backward_order(work: BlockMap, heads: int) -> Int[Array, " programs"]:
    """Return the work tile of each program of the backward kernel.

    A GPU starts programs in their order, each when a multiprocessor is free. Without documents, the
    kv heads come one after another, and in a head the key tiles with most work come first. With
    documents, two things are added:

    * Programs that run at once should read the same queries and add to the same dQ, while these
      are in the L2 cache. So in a head the key tiles of one document follow each other, longest
      document first.
    * No long tile may begin near the end, when other multiprocessors have nothing left. So the
      first programs take the longest tiles of the last head, whose other tiles come last.

    Measured on an H200 (`results/attention/h200/backward_order.json`), forward + backward: up to 6%
    less time on packed rows. Without documents it gains nothing.

    Args:
      work: a `key_map` of `row_tiles` row tiles.
      heads: kv heads.

    Returns:
      int32 [row_tiles * heads], each as kv head * row_tiles + index in the work list.
    """
    first = work.work[:, 0]
    row_tiles = first.shape[0]
    by_work = jnp.arange(row_tiles, dtype=jnp.int32)
    if work.row_ids is None:
        return jnp.concatenate([by_work + head * row_tiles for head in range(heads)])
    by_token = jnp.argsort(first[:, WorkField.ROW_TILE])
    # The key tiles of a document are neighbors, and the same last query sees them.
    last_query = work.row_bounds[:, :, 1].max(axis=(1, 2))[by_token]
    document = jnp.cumsum(jnp.diff(last_query, prepend=last_query[:1]) != 0)
    count = first[by_token, WorkField.COUNT]
    longest = jax.ops.segment_max(count, document, num_segments=row_tiles)[document]
    by_document = by_token[jnp.argsort(-longest, stable=True)].astype(jnp.int32)
    early, last = row_tiles // EARLY, (heads - 1) * row_tiles
    before = [by_document + head * row_tiles for head in range(heads - 1)]
    return jnp.concatenate([by_work[:early] + last, *before, by_work[early:] + last])
