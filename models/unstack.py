"""Weights that are stacked over layers, split into one block per layer for decoding."""

import functools
import operator
from typing import Any

import jax
from flax import nnx

from models.quantize import cast_weights, is_quantized


def unstack_layers(model: Any, *, consume: bool = False) -> Any:
    """Unstack the layers of a model for decoding, and cast all weights to the compute dtype.

    A decoding step reads every weight once and does little else. From stacked weights XLA first
    copies each layer's part; with one program for every layer it compiles and tunes the products
    of each layer anew.

    Returns:
      An `InternLM2` whose `blocks` is a list of L blocks.

    Memory: the weights in the compute dtype, beside the model's. With `consume` each stack is freed
    as soon as it has been split: one stack (w1 of all layers, in 20B a quarter of the model) more
    than the model, which cannot be used afterwards.
    """
    leaves, tree = jax.tree.flatten(model.blocks, is_leaf=is_quantized)
    parts = []
    for leaf in leaves:
        parts.append(_split(leaf, model.execution.dtype))
        if consume:
            for array in jax.tree.leaves(leaf):
                array.delete()  # takes effect on the device once the copies are made
    unstacked = jax.tree.map(lambda x: x, model)
    unstacked.blocks = nnx.List([tree.unflatten(layer) for layer in zip(*parts, strict=True)])
    others = {name: x for name, x in vars(unstacked).items() if isinstance(x, nnx.Param)}
    for name, x in others.items():
        setattr(unstacked, name, jax.tree.map(lambda w: w.astype(model.execution.dtype), x))
    return unstacked


@functools.partial(jax.jit, static_argnames="dtype")
def _split(stack, dtype):
    layers = len(jax.tree.leaves(stack)[0])
    return [cast_weights(jax.tree.map(operator.itemgetter(i), stack), dtype) for i in range(layers)]
