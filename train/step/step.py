"""One optimizer step as a pure function: (state, batch) -> (state, metrics), compiled once.

Gradients are of the sum of losses divided by the number of loss tokens of the whole step, over
microbatches, rows and devices, so that 1 x 8 rows, 8 x 1 and 2 x 4 are the same step.

A microbatch, B row of a microbatch, T position, D embed. A `Batch` has arrays [A, B, T] here; its
segment_ids may be None: one document a row, without padding.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from models.sharding import spec
from train.data import Batch
from train.distributed.hosts import share
from train.step.guard import judge
from train.step.loss import cross_entropy_and_z
from train.step.state import Params, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    spike: float = math.inf,
    z_loss: float = 0.0,
) -> Step:
    """The training step, for `compile_step`.

    Args:
        graphdef: the model's, from `train.step.state.abstract_state`.
        tx: the optimizer.
        schedule: its learning rate, for the metrics.
        spike: gradient norms above this many times the usual one are skipped (`train.step.guard`).
        z_loss: factor of the z-loss (`train.step.loss`).

    Returns:
        (state, batch [A, B, T]) -> (new state, float32 scalars: loss, the mean cross-entropy over
        the step's loss tokens; z_loss, the mean of what is added to it, if anything is; grad_norm
        before clipping; lr; loss_tokens; tokens, those that are not padding; skipped, steps so far
        that changed nothing, and in_a_row, those at its end).
    """

    def micro_loss(params: Params, micro, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        x_BTD = model.hidden(micro.tokens, positions=micro.positions, segment_ids=micro.segment_ids)
        total, z = cross_entropy_and_z(
            x_BTD, model.unembedding(), micro.targets, micro.loss_mask, z_loss=z_loss
        )
        return total / count, z / count

    def loss_and_grads(params: Params, batch: Batch, count: jax.Array):
        value_and_grad = jax.value_and_grad(micro_loss, has_aux=True)
        grad_accum = batch.tokens.shape[0]
        if grad_accum == 1:  # without a second copy of the gradients
            return value_and_grad(params, jax.tree.map(lambda a: a[0], batch), count)

        def add(carry, micro):
            of_micro = value_and_grad(params, micro, count)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, of_micro), None

        zeros = jax.tree.map(
            lambda p: jnp.zeros_like(p, jnp.float32),
            ((jnp.float32(0), jnp.float32(0)), params),
        )
        return jax.lax.scan(add, zeros, batch)[0]

    def update(grads: Params, params: Params, opt_state: optax.OptState):
        updates, opt_state = tx.update(_in_float32(grads), opt_state, params)
        return jax.tree.map(_updated, params, updates), opt_state

    def step(state: TrainState, batch: Batch):
        loss_tokens = jnp.sum(batch.loss_mask)
        # A batch without a single target has loss 0 and gradient 0, not NaN.
        (total, z), grads = loss_and_grads(state.params, batch, jnp.maximum(loss_tokens, 1.0))
        norm, done = optax.tree.norm(_in_float32(grads)), state.step - state.guard.skipped
        good, guard = judge(state.guard, updates=done, loss=total, norm=norm, spike=spike)
        metrics = {
            "loss": total - z,
            **({"z_loss": z} if z_loss else {}),
            "grad_norm": norm,
            "lr": schedule(done),
            "loss_tokens": loss_tokens,
            "tokens": _count_tokens(batch),
            "skipped": guard.skipped.astype(jnp.float32),
            "in_a_row": guard.in_a_row.astype(jnp.float32),
        }
        old = state.params, state.opt_state
        new = update(grads, *old)
        params, opt_state = jax.tree.map(functools.partial(jnp.where, good), new, old)
        return TrainState(state.step + 1, params, opt_state, guard), metrics

    return step


def compile_step(
    step: Step, like: TrainState, batch: Batch, options: dict[str, bool] | None = None
) -> jax.stages.Compiled:
    """Compiles for one shape of batch; the state's memory is reused for the new state.

    Args:
        step: from `make_step`.
        like: the state, or its ShapeDtypeStructs with shardings.
        batch: the same of a batch.
        options: for the compiler, as `train.distributed.device.compiler_options` has them.

    Returns:
        The step; it consumes its first argument.

    Raises:
        ValueError, NotImplementedError: what attention or model cannot do, found in tracing.
    """
    where = jax.tree.map(lambda a: a.sharding, like)
    with jax.set_mesh(like.mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        return jitted.lower(like, batch).compile(compiler_options=options)


def put_batch(batch: Batch, *, grad_accum: int, mesh: Mesh) -> Batch:
    """Splits the loader's rows into microbatches [A, B, T], and these over the devices.

    Args:
        batch: numpy arrays [A * B, T]; of several processes each has its own part of the rows
            (`train.distributed.hosts.share`), and which rows share a microbatch depends on how many
            processes there are.
        grad_accum: A.
        mesh: the devices.
    """
    _, parts = share(mesh)

    def put(a: np.ndarray) -> jax.Array:
        rows, T = a.shape
        return jax.make_array_from_process_local_data(
            _rows_over(mesh),
            a.reshape(grad_accum, rows // grad_accum, T),
            (grad_accum, rows * parts // grad_accum, T),
        )

    return jax.tree.map(put, batch)


def batch_struct(*, rows: int, seq_len: int, grad_accum: int, mesh: Mesh) -> Batch:
    """What `put_batch` returns, without numbers."""

    def struct(dtype) -> Any:
        shape = (grad_accum, rows // grad_accum, seq_len)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=_rows_over(mesh))

    dtypes = dict.fromkeys(Batch._fields, jnp.int32) | {"loss_mask": jnp.float32}
    return Batch(**{name: struct(dtype) for name, dtype in dtypes.items()})


def _updated(p: jax.Array, update: jax.Array) -> jax.Array:
    """The new weight in its own type; a bfloat16 one is exact, the optimizer has rounded it."""
    return (p.astype(update.dtype) + update).astype(p.dtype)


def _in_float32(grads: Params) -> Params:
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads)


def _count_tokens(batch: Batch) -> jax.Array:
    """How many are not padding, in float32."""
    if batch.segment_ids is None:
        return jnp.float32(batch.tokens.size)
    return jnp.sum((batch.segment_ids > 0).astype(jnp.float32))


def _rows_over(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec((None, "batch", None), mesh))
