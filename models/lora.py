"""LoRA: low-rank adapters on the linear layers of a block, beside frozen weights.

y = x W + scale * dropout(x) A B, with A [*in, R] and B [R, *out]. W is frozen, and may be quantized
(`models.quantize`). A starts uniform in +-1 / sqrt(inputs), B at zero, so that a model with a new
adapter computes what it computed without.

B batch, T query pos, R rank; other axes as in the weight's name.

References:
  Hu et al. 2021, arXiv:2106.09685, section 4.1; Dettmers et al. 2023, arXiv:2305.14314 (QLoRA);
  Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA); peft 0.21, tuners/lora/layer.py (initial values).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from models import sharding
from models.config import ModelConfig

TARGETS = ("wqkv", "wo", "w1", "w3", "w2")
"""Linear layers of a block, named as in InternLM2."""


DropoutKeys = Mapping[str, Array]
"""Random keys by target; without dropout none."""

Adapters = Any
"""An nnx.Dict of `Adapter` by target. beartype cannot check the class: it derives from a type of
the typing module that is deprecated."""

NO_DROPOUT: DropoutKeys = MappingProxyType({})


class LoRAParam(nnx.Param):
    """Mark a parameter of an adapter: these are trained, all other parameters are frozen."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """Describe the adapters of a model.

    Attributes:
      rank: R.
      alpha: the adapters' output is scaled by alpha / rank.
      dropout: share of an adapter's inputs that are set to zero in training.
      targets: linear layers that get an adapter, of `TARGETS`.
      rslora: scale by alpha / sqrt(rank) instead.

    Raises:
      ValueError: a number is out of range, or a target is unknown, named twice or none at all.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False

    def __post_init__(self):
        """Check the ranges."""
        if self.rank < 1:
            raise ValueError(f"lora rank={self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora alpha={self.alpha} must be above 0 and finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout={self.dropout} must be in [0, 1)")
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora targets={','.join(self.targets)} must be one or more of "
                f"{', '.join(TARGETS)}, each once"
            )

    @property
    def scale(self) -> float:
        """Return the factor of the adapters' output."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nnx.Module):
    """Add a low-rank product to one linear layer.

    Args:
      lora: rank, scale and dropout.
      shape: of the layer's weight, [*in, *out].
      axes: logical axes of the weight, for sharding.
      inputs: number of input axes.
      key: random key that A is drawn with.

    Raises:
      ValueError: the rank exceeds the smaller side of the weight.
    """

    def __init__(
        self,
        lora: LoRA,
        shape: tuple[int, ...],
        axes: sharding.Axes,
        *,
        inputs: int,
        key: Key[Array, ""],
    ):
        fan_in, fan_out = math.prod(shape[:inputs]), math.prod(shape[inputs:])
        if lora.rank > min(fan_in, fan_out):
            raise ValueError(
                f"lora rank={lora.rank} exceeds a linear layer of {fan_in} x {fan_out}: "
                f"at most {min(fan_in, fan_out)}"
            )
        self.lora, self.inputs = lora, inputs
        bound = 1 / math.sqrt(fan_in)
        a = jax.random.uniform(key, (*shape[:inputs], lora.rank), jnp.float32)
        self.a = LoRAParam((2 * a - 1) * bound, axes=(*axes[:inputs], None))
        b = jnp.zeros((lora.rank, *shape[inputs:]), jnp.float32)
        self.b = LoRAParam(b, axes=(None, *axes[inputs:]))

    def __call__(
        self,
        subscripts: str,
        x: Float[Array, "B T ..."],
        *,
        x_axes: sharding.Axes,
        out: sharding.Axes,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "B T ..."]:
        """Compute scale * dropout(x) A B; x, A and B must have the compute type.

        `subscripts` is that of the linear layer's einsum, such as "BTD,DKgH->BTKgH"; `x_axes` and
        `out` are the logical axes of x and of the result. Without a key there is no dropout.
        """
        operands, result = subscripts.split("->")
        x_names, w_names = operands.split(",")
        a_names, b_names = w_names[: self.inputs] + "R", "R" + w_names[self.inputs :]
        middle = x_names[: -self.inputs] + "R"
        if key is not None and self.lora.dropout:
            x = _dropout(x, self.lora.dropout, key, x_axes)
        a = sharding.gathered(self.a[...], *self.a.axes[-self.a.ndim :])
        b = sharding.gathered(self.b[...], *self.b.axes[-self.b.ndim :])
        low = sharding.einsum(f"{x_names},{a_names}->{middle}", x, a, out=(*x_axes[:2], None))
        return sharding.einsum(
            f"{middle},{b_names}->{result}", low * jnp.asarray(self.lora.scale, x.dtype), b, out=out
        )


def make_adapters(
    lora: LoRA | None,
    weights: Mapping[str, tuple[tuple[int, ...], sharding.Axes, int]],
    *,
    rngs: nnx.Rngs,
) -> Adapters:
    """Create the adapters of a module's linear layers, by target; empty without LoRA.

    `weights` has the shape, logical axes and number of input axes of each linear layer. The key of
    the `params` stream, with a number for each target, draws A. The stream itself does not advance:
    the other weights are the same with and without adapters.

    Raises:
      ValueError: the rank exceeds a layer.
    """
    if lora is None:
        return nnx.Dict()
    return nnx.Dict(
        {
            name: Adapter(lora, shape, axes, inputs=inputs, key=_key(rngs, name))
            for name, (shape, axes, inputs) in weights.items()
            if name in lora.targets
        }
    )


def add_adapter(
    adapters: Adapters,
    name: str,
    y: Array,
    subscripts: str,
    x: Array,
    *,
    dropout: DropoutKeys,
    **axes,
) -> Array:
    """Add the output of a linear layer's adapter, if it has one, to the layer's output y.

    `name` is the target; x is the layer's input; subscripts and axes (x_axes, out) are arguments of
    the `Adapter`.
    """
    if name not in adapters:
        return y
    return y + adapters[name](subscripts, x, key=dropout.get(name), **axes)


def dropout_keys(key: Key[Array, ""] | None) -> DropoutKeys:
    """Return one dropout key for each target of a block; none for None."""
    if key is None:
        return NO_DROPOUT
    return dict(zip(TARGETS, jax.random.split(key, len(TARGETS)), strict=True))


def partition(tree: Any, *, trained: type[nnx.Variable]) -> tuple[Any, Any]:
    """Split a module into two of the same structure: trained variables, and all others.

    The arrays of the other half are None in each. Gradient rules of a whole module (`unstack`,
    `grad_barrier`) then see trained weights alone: for a frozen weight they would make XLA
    compute a gradient that nothing uses.
    """

    def half(keep: bool):
        return jax.tree.map(
            lambda v: v if isinstance(v, trained) == keep else v.replace(None),
            tree,
            is_leaf=lambda x: isinstance(x, nnx.Variable),
        )

    return half(True), half(False)


def combine(trained: Any, frozen: Any) -> Any:
    """Undo `partition`."""

    def either(a, b):
        return b if a.get_value() is None else a

    return jax.tree.map(either, trained, frozen, is_leaf=lambda x: isinstance(x, nnx.Variable))


def adapter_params_count(lora: LoRA, config: ModelConfig) -> int:
    """Count the parameters of all adapters of a model."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    attended, projected = config.num_heads * H, (config.num_heads + 2 * config.num_kv_heads) * H
    sides = {
        "wqkv": D + projected,
        "wo": attended + D,
        "w1": D + F,
        "w3": D + F,
        "w2": F + D,
    }
    return config.num_layers * lora.rank * sum(sides[target] for target in lora.targets)


def adapter_params(model: Any) -> dict[str, tuple[Any, Any]]:
    """Return the arrays (A [L, *in, R], B [L, R, *out]) of a model's adapters by target.

    The arrays may be ShapeDtypeStructs.
    """
    blocks = model.blocks
    adapters = {**blocks.attention.lora, **blocks.ffn.lora}
    return {t: (adapters[t].a.get_value(), adapters[t].b.get_value()) for t in adapters}


def with_adapter_params(model: Any, params: Mapping[str, tuple[Any, Any]]) -> Any:
    """Replace the arrays of a model's adapters by those of `adapter_params`; return the model."""
    for adapters in (model.blocks.attention.lora, model.blocks.ffn.lora):
        for target, adapter in adapters.items():
            for param, value in zip((adapter.a, adapter.b), params[target], strict=True):
                place = jax.typeof(param.get_value()).sharding
                sharding_ = None if place.mesh.empty else param.get_value().sharding
                param.set_value(jax.device_put(jnp.asarray(value), sharding_))
    return model


def merged(
    w: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "..."], lora: LoRA
) -> Float[Array, "..."]:
    """Return W [*in, *out] + scale * A [*in, R] B [R, *out], rounded once to the type of W."""
    with jax.default_matmul_precision("highest"):
        update = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)
    return (w.astype(jnp.float32) + lora.scale * update).astype(w.dtype)


def _key(rngs: nnx.Rngs, target: str) -> Array:
    """Return a key for a target's A; the stream counts from 0 and does not reach these numbers."""
    return jax.random.fold_in(rngs.params.key[...], 2**31 + TARGETS.index(target))


def _dropout(x: Array, rate: float, key: Array, axes: Sequence[str | None]) -> Array:
    """Set a share of x to zero and scale the rest up; the same elements on any mesh."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=sharding.current_spec(axes))
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))
