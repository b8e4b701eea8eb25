"""One optimizer step as a pure function: (state, batch) -> (state, metrics), compiled once.

Gradients are of the sum of losses divided by the number of loss tokens of the whole step, over
microbatches, rows and devices, so that 1 x 8 rows, 8 x 1 and 2 x 4 are the same step.

A microbatch, B row of a microbatch, T position, D embed. A `Batch` has arrays [A, B, T] here; its
segment_ids may be None: one document a row, without padding.
"""

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
from train.loss import cross_entropy
from train.state import Params, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Step:
    """The training step, for `compile_step`.

    Args:
        graphdef: the model's, from `train.state.abstract_state`.
        tx: the optimizer.
        schedule: its learning rate, for the metrics.

    Returns:
        (state, batch [A, B, T]) -> (new state, float32 scalars: loss, the mean over the step's
        loss tokens; grad_norm before clipping; lr; loss_tokens; tokens, those that are not
        padding).
    """

    def micro_loss(params: Params, micro, count: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        x_BTD = model.hidden(micro.tokens, positions=micro.positions, segment_ids=micro.segment_ids)
        total = cross_entropy(x_BTD, model.unembedding(), micro.targets, micro.loss_mask)
        return total / count

    def loss_and_grads(params: Params, batch: Batch, count: jax.Array):
        value_and_grad = jax.value_and_grad(micro_loss)
        accum = batch.tokens.shape[0]
        if accum == 1:  # without a second copy of the gradients
            return value_and_grad(params, jax.tree.map(lambda a: a[0], batch), count)

        def add(carry, micro):
            of_micro = value_and_grad(params, micro, count)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, of_micro), None

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), (jnp.float32(0), params))
        return jax.lax.scan(add, zeros, batch)[0]

    def step(state: TrainState, batch: Batch):
        loss_tokens = jnp.sum(batch.loss_mask)
        # A batch without a single target has loss 0 and gradient 0, not NaN.
        loss, grads = loss_and_grads(state.params, batch, jnp.maximum(loss_tokens, 1.0))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "lr": schedule(state.step),
            "loss_tokens": loss_tokens,
            "tokens": _count_tokens(batch),
        }
        params = jax.tree.map(_updated, state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def compile_step(step: Step, like: TrainState, batch: Batch) -> jax.stages.Compiled:
    """Compiles for one shape of batch; the state's memory is reused for the new state.

    Args:
        step: from `make_step`.
        like: the state, or its ShapeDtypeStructs with shardings.
        batch: the same of a batch.

    Returns:
        The step; it consumes its first argument.

    Raises:
        ValueError, NotImplementedError: what attention or model cannot do, found in tracing.
    """
    where = jax.tree.map(lambda a: a.sharding, like)
    with jax.set_mesh(like.mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        return jitted.lower(like, batch).compile()


def put_batch(batch: Batch, *, accum: int, mesh: Mesh) -> Batch:
    """Splits the loader's rows into microbatches [A, B, T], and these over the devices.

    Args:
        batch: numpy arrays [A * B, T].
        accum: A.
        mesh: the devices.
    """

    def put(a: np.ndarray) -> jax.Array:
        rows, T = a.shape
        return jax.device_put(a.reshape(accum, rows // accum, T), _rows_over(mesh))

    return jax.tree.map(put, batch)


def batch_struct(*, rows: int, seq_len: int, accum: int, mesh: Mesh) -> Batch:
    """What `put_batch` returns, without numbers."""

    def struct(dtype) -> Any:
        shape = (accum, rows // accum, seq_len)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=_rows_over(mesh))

    dtypes = dict.fromkeys(Batch._fields, jnp.int32) | {"loss_mask": jnp.float32}
    return Batch(**{name: struct(dtype) for name, dtype in dtypes.items()})


def _updated(p: jax.Array, update: jax.Array) -> jax.Array:
    """The new weight in its own type; a bfloat16 one is exact, the optimizer has rounded it."""
    return (p.astype(update.dtype) + update).astype(p.dtype)


def _count_tokens(batch: Batch) -> jax.Array:
    """How many are not padding, in float32."""
    if batch.segment_ids is None:
        return jnp.float32(batch.tokens.size)
    return jnp.sum((batch.segment_ids > 0).astype(jnp.float32))


def _rows_over(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec((None, "batch", None), mesh))
