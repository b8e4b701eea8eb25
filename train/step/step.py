"""One optimizer step as a pure function, (state, batch) -> (state, metrics), compiled once.

The loss is the sum over all positions divided by the number of loss tokens of the whole step, over
microbatches, rows and devices, so that 1 x 8 rows, 8 x 1 and 2 x 4 give the same step.

A microbatch, B row of a microbatch, T position, D embed. A `Batch` has arrays [A, B, T] here; its
segment_ids are None for rows of one document without padding.
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
from train.data.pack.packing import Batch, source_dtype
from train.distributed.hosts import share
from train.step.by_source import sum_by_source
from train.step.guard import should_update
from train.step.loss import cross_entropy_and_z
from train.step.state import Params, TrainState, merge_params
from train.step.update import update_weights

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    spike: float = math.inf,
    z_loss: float = 0.0,
    dropout_seed: int | None = None,
    sources: int = 1,
    layered: bool = False,
) -> Step:
    """Make the training step, for `compile_step`.

    Args:
        graphdef: the model's, from `train.step.state.abstract_state`.
        tx: the optimizer.
        schedule: its learning rate, for the metrics.
        spike: gradient norms above this multiple of their running mean are skipped
            (`train.step.guard`).
        z_loss: factor of the z-loss (`train.step.loss`).
        dropout_seed: seed of the adapters' dropout, which differs from step to step and between
            microbatches; None: no dropout.
        sources: number of sources of the data, whose losses are metrics if there are several.
        layered: update the weights one layer at a time (`train.step.update`).

    Returns:
        (state, batch [A, B, T]) -> (new state, metrics). Metrics are float32 scalars: loss, the
        mean cross-entropy over the step's loss tokens; z_loss, the mean of the z-loss term, if
        there is one; grad_norm before clipping; lr; loss_tokens; tokens without padding; skipped,
        steps skipped so far; not_finite, weights that kept their values in this step because their
        update was not finite; in_a_row, steps since the last one that was neither skipped nor had
        such weights. With several sources also source_losses and source_tokens, arrays [S]: the sum
        of each source's losses, and its loss tokens.
    """
    loss = functools.partial(_microbatch_loss, graphdef, z_loss, sources)
    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def step(state: TrainState, batch: Batch):
        loss_tokens = jnp.sum(batch.loss_mask)
        # A batch without a target has loss 0 and gradient 0, not NaN.
        count = jnp.maximum(loss_tokens, 1.0)
        key = None
        if dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(dropout_seed), state.step)

        def of_microbatch(micro, number):
            own = None if key is None else jax.random.fold_in(key, number)
            return value_and_grad(state.params, state.frozen, micro, count, own)

        (total, (z, source_losses)), grads = _accumulate(
            of_microbatch, state.params, batch, sources
        )
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        updates = state.step - state.guard.skipped
        good, guard = should_update(
            state.guard, updates=updates, loss=total, norm=norm, spike=spike
        )
        metrics = {
            "loss": total - z,
            **({"z_loss": z} if z_loss else {}),
            "grad_norm": norm,
            "lr": schedule(updates),
            "loss_tokens": loss_tokens,
            "tokens": _count_tokens(batch),
            "skipped": guard.skipped.astype(jnp.float32),
        }
        if batch.sources is not None:
            metrics["source_losses"] = source_losses
            metrics["source_tokens"] = sum_by_source(
                jnp.asarray(batch.loss_mask), batch.sources, sources
            )
        params, opt_state, broken = update_weights(
            tx, grads, state.params, state.opt_state, norm=norm, good=good, layered=layered
        )
        guard = guard._replace(
            in_a_row=jnp.where(broken > 0, state.guard.in_a_row + 1, guard.in_a_row)
        )
        metrics |= {"in_a_row": guard.in_a_row.astype(jnp.float32), "not_finite": broken}
        return TrainState(state.step + 1, params, opt_state, guard, state.frozen), metrics

    return step


def compile_step(
    step: Step, like: TrainState, batch: Batch, options: dict[str, bool | int] | None = None
) -> jax.stages.Compiled:
    """Compile a step for one shape of batch; the new state reuses the memory of the old one.

    Args:
        step: from `make_step`.
        like: the state, or its ShapeDtypeStructs with shardings.
        batch: arrays of a batch, or their ShapeDtypeStructs.
        options: compiler options, from `train.distributed.device.compiler_options`.

    Returns:
        The compiled step; it donates its first argument.

    Raises:
        ValueError, NotImplementedError: attention or model refuse the shapes while tracing.
    """
    of_state = jax.tree.map(lambda a: a.sharding, like)
    with jax.set_mesh(like.mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(of_state, None))
        return jitted.lower(like, batch).compile(compiler_options=options)


def put_batch(batch: Batch, *, grad_accum: int, mesh: Mesh) -> Batch:
    """Split rows into microbatches [A, B, T] and put them on the devices.

    Args:
        batch: numpy arrays [A * B, T]; each of several processes has its own part of the rows
            (`train.distributed.hosts.share`), with all of their positions. The rows of a microbatch
            depend on the number of processes.
        grad_accum: A.
        mesh: the devices.
    """
    index, parts = share(mesh)

    def put(a: np.ndarray) -> jax.Array:
        own = a.reshape(grad_accum, -1, a.shape[1])
        _, rows, T = own.shape

        def part(where: Any) -> np.ndarray:
            micro, of_rows, positions = where
            first, end, _ = of_rows.indices(rows * parts)
            return own[micro, first - index * rows : end - index * rows, positions]

        shape = (grad_accum, rows * parts, T)
        return jax.make_array_from_callback(shape, _batch_sharding(mesh), part)

    return jax.tree.map(put, batch)


def batch_struct(
    *, rows: int, seq_len: int, grad_accum: int, mesh: Mesh, sources: int = 1
) -> Batch:
    """Return the ShapeDtypeStructs of what `put_batch` returns, for data of so many sources."""

    def struct(dtype) -> Any:
        shape = (grad_accum, rows // grad_accum, seq_len)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=_batch_sharding(mesh))

    dtypes: dict[str, Any] = dict.fromkeys(Batch._fields, jnp.int32)
    dtypes |= {"loss_mask": jnp.float32, "sources": source_dtype(sources)}
    return Batch(**{name: struct(dtype) for name, dtype in dtypes.items() if dtype is not None})


def _microbatch_loss(
    graphdef: nnx.GraphDef,
    z_loss: float,
    sources: int,
    params: Params,
    frozen: Params | None,
    micro: Any,
    count: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the loss of a microbatch [B, T] and its z-loss term, both divided by count.

    Beside the z-loss term are the sums of the losses of each source, see `sum_by_source`.
    """
    model = nnx.merge(graphdef, merge_params(params, frozen))
    x_BTD = model.hidden(
        micro.tokens, positions=micro.positions, segment_ids=micro.segment_ids, dropout=key
    )
    total, z, losses_BT = cross_entropy_and_z(
        x_BTD,
        model.unembedding(),
        micro.targets,
        micro.loss_mask,
        z_loss=z_loss,
        train_w=frozen is None,
        by_position=micro.sources is not None,
    )
    return total / count, (z / count, sum_by_source(losses_BT, micro.sources, sources))


def _accumulate(of_microbatch: Callable, params: Params, batch: Batch, sources: int):
    """Sum ((loss, (z-loss, losses by source)), gradients) over the microbatches of [A, B, T]."""
    if batch.tokens.shape[0] == 1:  # without a second copy of the gradients
        return of_microbatch(jax.tree.map(lambda a: a[0], batch), 0)

    def add(carry, micro):
        of_micro = of_microbatch(*micro)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, of_micro), None

    by_source_S = jnp.zeros(0 if batch.sources is None else sources)
    sums = jnp.float32(0), (jnp.float32(0), by_source_S)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), (sums, params))
    return jax.lax.scan(add, zeros, (batch, jnp.arange(batch.tokens.shape[0])))[0]


def _count_tokens(batch: Batch) -> jax.Array:
    """Count the tokens that are not padding, as float32."""
    if batch.segment_ids is None:
        return jnp.float32(batch.tokens.size)
    return jnp.sum((batch.segment_ids > 0).astype(jnp.float32))


def _batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec((None, "batch", "seq"), mesh))
