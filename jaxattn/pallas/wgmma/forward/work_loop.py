"""A forward program's walk over its items, and over those again that the first pass could not hold.

Which items go to which program is said by `schedule.persistent_schedule`, what is wrong with one
by flags that the consumers set (`softmax.flag`).
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxattn.pallas.wgmma.forward.context import Job


def each_item(job: Job, body, load, between) -> None:
    """Runs body(i, head, place in the work list, loaded, column tiles before, careful).

    For all items, then `between`, and for those that are flagged: i goes on counting. Producer and
    consumers all call this, and so take the same items in the same order.

    Args:
      job: the program's.
      body: returns how many column tiles the item had. `careful` asks for a running maximum.
      load: what to read of an item from its place in the work list, one item ahead.
      between: runs before the second pass.
    """
    schedule, again = job.gmem.schedule, job.smem.again_smem

    def item(n):
        # The load ahead of the last item is the filling of the schedule's row.
        at = schedule[job.program, 1 + jnp.minimum(n, schedule.shape[1] - 2)]
        row, head = lax.rem(at, job.row_tiles), lax.div(at, job.row_tiles)
        return row, head, load(row)

    def step(i, carry):
        (row, head, loaded), done = carry
        ahead = item(i + 1)  # read now, so that the next item need not wait for it
        return ahead, done + body(i, head, row, loaded, done, careful=not job.two_passes)

    _, done = lax.fori_loop(0, job.items, step, (item(jnp.int32(0)), jnp.int32(0)))
    if not job.two_passes:
        return

    def flagged(place):
        return (again[0, place] | again[1, place]) != 0

    def repeat(n, carry):
        def run(i, done):
            row, head, loaded = item(n)
            return i + 1, done + body(i, head, row, loaded, done, careful=True)

        return lax.cond(flagged(flag_of(job, n)), run, lambda *carry: carry, *carry)

    between()
    plgpu.barrier_wait(job.smem.again_full)

    @pl.when(flagged(job.flags))
    def _():
        lax.fori_loop(0, job.items, repeat, (job.items, done))


def flag_of(job: Job, n):
    """Which flag is that of the program's n-th item."""
    return lax.div(n, jnp.int32(-(-(job.gmem.schedule.shape[1] - 1) // job.flags)))
