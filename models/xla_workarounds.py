"""Code that computes what plain JAX computes, written so that XLA compiles it well.

Each function names the effect it was written for and the jax version that showed it. Try the plain
form again with a later version.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from models import sharding


def project(subscripts: str, x: Array, w: Array, *, out: sharding.Axes) -> Array:
    """Compute `sharding.einsum(subscripts, x, w, out=out)`; x [B, T, ...], w a weight.

    For one row, B = T = 1, the product is made of two equal rows. XLA turns the product of one row
    with up to about 2^23 weights into an elementwise one, writes that to memory and then sums it:
    three times the weights' bytes, and reading weights is all that a decoding step waits for.
    Seen in the output of the GPU compiler, jax 0.11.2, at 1.8B; try `sharding.einsum` alone after
    it.
    """
    if x.shape[0] * x.shape[1] > 1:
        return sharding.einsum(subscripts, x, w, out=out)
    # The barriers hide from the compiler that the rows are equal and that one is dropped.
    two = jax.lax.optimization_barrier(jnp.concatenate([x, x], axis=1))
    return jax.lax.optimization_barrier(sharding.einsum(subscripts, two, w, out=out))[:, :1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(tree: Any, layers: int) -> list[Any]:
    """Return a list of L trees from a tree of arrays [L, ...], inside of a traced program.

    The gradient is one stack. Derived by JAX it would be a sum of L padded arrays (jax 0.11.2; try
    plain indexing after it).
    """
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(layers)]


def _unstack_forward(tree, layers):
    return unstack(tree, layers), None


def _unstack_backward(layers, _, gradients):
    return (jax.tree.map(lambda *x: jnp.stack(x), *gradients),)


unstack.defvjp(_unstack_forward, _unstack_backward)


@jax.custom_vjp
def grad_barrier(x: Any, weights: Any) -> tuple[Any, Any]:
    """Return the arguments; in the backward pass, dx waits for the gradients of the weights.

    Without the barrier XLA postpones the gradients of a layer's weights, in loops over microbatches
    to the end of the pass, and keeps the activations that they are computed from until then (1.8B
    at 32k, remat "attention", two microbatches: 78 GiB instead of 41). Seen with jax 0.11.2; try
    without after it.
    """
    return x, weights


def _barrier_forward(x, weights):
    return (x, weights), None


def _barrier_backward(_, gradients):
    return jax.lax.optimization_barrier(gradients)


grad_barrier.defvjp(_barrier_forward, _barrier_backward)
