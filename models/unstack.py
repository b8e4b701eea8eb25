"""Layers' weights that are stacked in a leading axis, taken apart."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def taken_apart(model: Any, *, consume: bool = False) -> Any:
    """A model for decoding: in its compute type, with a list of blocks instead of stacked ones.

    A token needs every weight once and little else. From a stack XLA first copies each layer's
    part, or, with one program for every layer, compiles and tunes each layer's products anew.

    Args:
      model: an `InternLM2`.
      consume: free the memory of each stack as soon as it has been taken apart. The model cannot
        be used afterwards.

    Memory: the weights in the compute type, beside the model's; if it is consumed, one stack (all
    layers' w1, in 20B a quarter of the model) more than the model.
    """
    leaves, tree = jax.tree.flatten(model.blocks)
    parts = []
    for leaf in leaves:
        parts.append(_split(leaf, model.dtype))
        if consume:
            leaf.delete()  # on the device once the copies are made
    apart = jax.tree.map(lambda x: x, model)
    apart.blocks = nnx.List([tree.unflatten(layer) for layer in zip(*parts, strict=True)])
    others = {name: x for name, x in vars(apart).items() if isinstance(x, nnx.Param)}
    for name, x in others.items():
        setattr(apart, name, jax.tree.map(lambda w: w.astype(model.dtype), x))
    return apart


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstacked(tree: Any, layers: int) -> list[Any]:
    """The tree [L, ...] as a list of L trees, inside of a program.

    Its gradient is stacked in one go; that of L slices would be a sum of L padded arrays.
    """
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(layers)]


def _forward(tree, layers):
    return unstacked(tree, layers), None


def _backward(layers, _, gradients):
    return (jax.tree.map(lambda *x: jnp.stack(x), *gradients),)


unstacked.defvjp(_forward, _backward)


@jax.custom_vjp
def gradients_together(x: Any, weights: Any) -> tuple[Any, Any]:
    """What it is given; in the backward pass, the gradient of x waits for that of the weights.

    Nothing else makes XLA form a layer's weights' gradients before it goes on to the layer before:
    it puts them off, in loops over microbatches to the end of the pass, and until then it keeps
    all activations that they are made of (1.8B at 32k, "attention", two parts: 78 GiB, not 41).
    """
    return x, weights


def _forward_together(x, weights):
    return (x, weights), None


def _backward_together(_, gradients):
    return jax.lax.optimization_barrier(gradients)


gradients_together.defvjp(_forward_together, _backward_together)


@functools.partial(jax.jit, static_argnames="dtype")
def _split(stack, dtype):
    return [layer.astype(dtype) for layer in stack]
