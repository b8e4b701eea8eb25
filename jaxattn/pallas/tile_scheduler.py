"""Which program of a persistent grid works on which item, and in which order.

An item is a row tile of the work list and a head. It is decided when the kernel is traced, from
counts alone: the work list is sorted by falling work, so a tile's place in it says enough.
"""

import numpy as np


def persistent_schedule(row_tiles: int, heads: int, programs: int) -> np.ndarray:
    """Items of every program, in order.

    Heads are taken one after another, so that the programs read the K and V of one or two heads
    at a time and find them in the L2 cache. Within a head the sorted row tiles are dealt out in
    rounds, every second one backwards: who gets the longest tile of one round gets the shortest
    of the next. What is still uneven within a head is the same for every head, so each head is
    dealt out from another program on, and it evens out. (The largest load over the mean on 132
    programs, computed for the benchmark's shapes: 1.000 to 1.013; without the rotation up to
    1.24, which is what a 1.8B causal row of 32k tokens then loses.)

    Args:
      row_tiles: length of the work list.
      heads: heads that each row tile is processed for.
      programs: programs of the grid, at most row_tiles * heads.

    Returns:
      int32 [programs, 1 + most items of a program]: the number of items, then the items as
      head * row_tiles + place in the work list; the rest of a row is filled with its last item.
    """
    head, place = np.divmod(np.arange(row_tiles * heads), row_tiles)
    if row_tiles < programs:  # not even one round in a head: deal out all heads in one go
        program = np.arange(row_tiles * heads) % programs
    else:
        deal, seat = np.divmod(place, programs)
        seat = np.where(deal % 2 == 1, programs - 1 - seat, seat)
        program = (seat + head * programs // heads) % programs
    count = np.bincount(program, minlength=programs)
    order = np.argsort(program, kind="stable")  # by program; within one, by head and place
    turn = np.arange(order.size) - np.repeat(np.cumsum(count) - count, count)
    schedule = np.zeros((programs, 1 + count.max()), np.int32)
    schedule[:, 0] = count
    schedule[program[order], 1 + turn] = order
    last = schedule[np.arange(programs), count]
    beyond = np.arange(schedule.shape[1]) > count[:, None]
    return np.where(beyond, last[:, None], schedule).astype(np.int32)
