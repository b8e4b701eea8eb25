"""One optimizer step as a pure function: (state, batch) -> (state, metrics), compiled once.

Gradients are of the sum of losses divided by the number of loss tokens of the whole step, over
microbatches, rows and devices, so that 1 x 8 rows, 8 x 1 and 2 x 4 are the same step.

A microbatch, B row of a microbatch, T position.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from models.sharding import spec
from train.data import Batch
from train.loss import cross_entropy
from train.state import Params, TrainState

Step = Callable[[TrainState, "DeviceBatch"], tuple[TrainState, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceBatch:
    """The rows of a step, in microbatches, on the devices."""

    tokens: Int[Array, "A B T"]
    """int32 token ids."""

    targets: Int[Array, "A B T"]
    """int32: the token after, inside the same document."""

    loss_mask: Float[Array, "A B T"]
    """float32: 0 where there is no target."""

    segment_ids: Int[Array, "A B T"]
    """int32: number of the document in its row; 0 is padding."""

    positions: Int[Array, "A B T"]
    """int32: position inside the document."""


def put_batch(batch: Batch, *, accum: int, mesh: Mesh) -> DeviceBatch:
    """Splits a batch of the loader into microbatches and its rows over the devices.

    Args:
        batch: numpy arrays [rows, T]; rows must be a multiple of accum.
        accum: number of microbatches.
        mesh: the devices.
    """

    where = NamedSharding(mesh, spec((None, "batch", None), mesh))

    def put(a: np.ndarray) -> jax.Array:
        rows, T = a.shape
        return jax.device_put(a.reshape(accum, rows // accum, T), where)

    return DeviceBatch(
        **{f.name: put(getattr(batch, f.name)) for f in dataclasses.fields(DeviceBatch)}
    )


def make_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Step:
    """The training step, to be jitted by `compile_step`.

    Args:
        graphdef: the model's, from `train.state.abstract_state`.
        tx: the optimizer.
        schedule: its learning rate, for the metrics.

    Returns:
        (state, batch) -> (new state, float32 scalars: loss, mean over the step's loss tokens;
        grad_norm before clipping; lr; loss_tokens; tokens, those that are not padding).
    """

    def micro_loss(params: Params, micro: DeviceBatch, count: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        x_BTD = model.hidden(
            micro.tokens, positions=micro.positions, segment_ids=micro.segment_ids
        )
        total = cross_entropy(x_BTD, model.unembedding(), micro.targets, micro.loss_mask)
        return total / count

    def loss_and_grads(params: Params, batch: DeviceBatch, count: jax.Array):
        value_and_grad = jax.value_and_grad(micro_loss)
        accum = batch.tokens.shape[0]
        if accum == 1:  # no second copy of the gradients
            return value_and_grad(params, jax.tree.map(lambda a: a[0], batch), count)

        def add(carry, micro):
            return jax.tree.map(jnp.add, carry, value_and_grad(params, micro, count)), None

        zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add, zeros, batch)[0]

    def step(state: TrainState, batch: DeviceBatch):
        loss_tokens = jnp.sum(batch.loss_mask)
        # A batch without a single target has loss 0 and gradient 0, not NaN.
        loss, grads = loss_and_grads(state.params, batch, jnp.maximum(loss_tokens, 1.0))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
            "loss_tokens": loss_tokens,
            "tokens": jnp.sum((batch.segment_ids > 0).astype(jnp.float32)),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def compile_step(step: Step, state: TrainState, batch: DeviceBatch, mesh: Mesh) -> Step:
    """Compiles for one shape of batch; the state's memory is reused for the new state.

    Args:
        step: from `make_step`.
        state: arrays or ShapeDtypeStructs with shardings.
        batch: the same.
        mesh: the devices.

    Returns:
        The compiled step; its first argument is consumed.

    Raises:
        ValueError, NotImplementedError: what attention or model cannot do, found in tracing.
    """
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile()
