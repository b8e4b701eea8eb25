"""Update the weights: the optimizer's rule on whole arrays, or one layer at a time.

Weights are stacks over the layers, [L, ...]. A rule that reads every number once becomes one pass
over each stack. Int8 moments are read twice, because the largest number of a block is needed before
the first is quantized, and XLA keeps both moments of a whole stack in float32 in between: 10 bytes
per weight of the largest stack, 45 GiB at 20B. Layer by layer it keeps those of one layer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config.sections import OptimConfig
from train.step.rounding import Place
from train.step.state import Params

BLOCKS = "blocks"
"""Name of the weights that are stacked over layers, in `Params` and in moments."""


def by_layer(optim: OptimConfig, *, scan: bool, lora: bool) -> bool:
    """Return whether a run updates its weights one layer at a time.

    Without a scan the gradient of each layer is a separate array: stacking them would need as much
    memory as this saves. Adapters are small.

    Args:
        optim: the optimizer.
        scan: whether the layers of the step are one scan.
        lora: whether adapters alone are trained.
    """
    return scan and not lora and optim.name == "adamw" and optim.moment_dtype == "int8"


def update_weights(
    tx: optax.GradientTransformationExtraArgs,
    grads: Params,
    params: Params,
    opt_state: optax.OptState,
    *,
    norm: jax.Array,
    good: jax.Array,
    layered: bool,
) -> tuple[Params, optax.OptState, jax.Array]:
    """Update weights and optimizer state where the gradient is good.

    A finite gradient can still give an update that is not. Only the weights concerned keep their
    values: skipping the whole step would take the memory of a second set of weights.

    Args:
        tx: from `train.step.optim.optimizer`.
        grads: gradients in any float dtype.
        params: weights.
        opt_state: the optimizer's.
        norm: float32 scalar, norm of all gradients.
        good: bool scalar; False: everything keeps its value.
        layered: one layer at a time, for rules that compute each element, or each block of the last
            axis, on its own (`by_layer`).

    Returns:
        (weights in their own dtypes; optimizer state; float32 scalar: weights that kept their
        values because their update was not finite).
    """
    names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]

    def update(grads: Params, params: Params, opt_state: Any, place: Place) -> Any:
        g = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, new_state = tx.update(g, opt_state, params, norm=norm, place=place)
        new = jax.tree.map(_add, params, updates)
        finite = jax.tree.map(jnp.isfinite, new)
        kept = sum(jnp.sum(~ok, dtype=jnp.float32) for ok in jax.tree.leaves(finite))
        new = jax.tree.map(lambda ok, *p: jnp.where(good & ok, *p), finite, new, params)
        new_state = jax.tree.map(lambda *s: jnp.where(good, *s), new_state, opt_state)
        return new, new_state, jnp.where(good, kept, 0.0)

    if not layered:
        return update(grads, params, opt_state, Place(tuple(range(len(names)))))

    streams: dict[bool, list[int]] = {True: [], False: []}
    for i, name in enumerate(names):
        streams[name == BLOCKS].append(i)
    layers = jax.tree.leaves(params[BLOCKS])[0].shape[0]

    def of_layer(i: jax.Array, carry: Any) -> Any:
        *stacks, kept = carry
        g, p, state = (_map_blocks(lambda a: a[i], x) for x in (_part(grads, True), *stacks))
        *new, more = update(g, p, state, Place(tuple(streams[True]), i))
        written = [
            _map_blocks(lambda a, of_layer: a.at[i].set(of_layer), stack, value)
            for stack, value in zip(stacks, new, strict=True)
        ]
        return *written, kept + more

    # A loop with a carry, not a scan: its results take the memory of its arguments.
    start = _part(params, True), _part(opt_state, True), jnp.float32(0)
    *stacks, kept = jax.lax.fori_loop(0, layers, of_layer, start)
    g, p, state = (_part(tree, False) for tree in (grads, params, opt_state))
    *others, more = update(g, p, state, Place(tuple(streams[False])))
    new_params, new_state = (_join(o, s) for o, s in zip(others, stacks, strict=True))
    return new_params, new_state, kept + more


def _add(p: jax.Array, update: jax.Array) -> jax.Array:
    # The optimizer has rounded updates of bfloat16 parameters, so that the cast is exact.
    return (p.astype(update.dtype) + update).astype(p.dtype)


def _is_params(tree: Any) -> bool:
    return isinstance(tree, dict)


def _part(tree: Any, in_blocks: bool) -> Any:
    """Return the part under `BLOCKS`, or the rest, of weights and of trees like them in a state."""

    def part(x: Any) -> Any:
        if not _is_params(x):
            return x
        return {name: value for name, value in x.items() if (name == BLOCKS) == in_blocks}

    return jax.tree.map(part, tree, is_leaf=_is_params)


def _join(others: Any, stacks: Any) -> Any:
    """Merge what `_part` has taken apart; counts are those of the first."""
    return jax.tree.map(
        lambda a, b: a | b if _is_params(a) else a, others, stacks, is_leaf=_is_params
    )


def _map_blocks(f: Any, tree: Any, *others: Any) -> Any:
    """Map the arrays of weights and of trees like them; counts stay those of the first tree."""

    def of(x: Any, *xs: Any) -> Any:
        return jax.tree.map(f, x, *xs) if _is_params(x) else x

    return jax.tree.map(of, tree, *others, is_leaf=_is_params)
