"""Products in 8 bits: error, scales, gradients, layouts over devices, and values not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import fp8, sharding
from models.cache import prefill
from models.config import PRESETS
from models.execution import Execution
from models.internlm2 import InternLM2, init
from models.layers import rms_norm
from models.lora import LoRA, LoRAParam
from models.remat import REMAT

B, T, D, F = 2, 32, 64, 96
OUT = ("batch", None, None)
# Half a unit in the last place, relative: 3 mantissa bits of e4m3, 2 of e5m2.
E4M3, E5M2 = 2.0**-4, 2.0**-3


def draw(seed, shape, scale=1.0):
    """Numbers of both signs, from 1/8 to 1 times the scale: none is subnormal in 8 bits."""
    sizes, signs = jax.random.split(jax.random.key(seed))
    drawn = jax.random.uniform(sizes, shape, minval=0.125, maxval=1.0)
    return scale * drawn * jnp.where(jax.random.bernoulli(signs, shape=shape), 1.0, -1.0)


def relative(got, want):
    """Norm of the difference over the norm of what is right, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@jax.jit
def product_and_gradients(x, w, dy):
    y, pull = jax.vjp(lambda x, w: fp8.product(x, w, fp8.largest(x), OUT), x, w)
    return y, *pull(dy)


@jax.jit
def swiglu_and_gradients(x, w1, w3, w2, dy):
    y, pull = jax.vjp(lambda *args: fp8.swiglu(*args, fp8.largest(x)), x, w1, w3, w2)
    return y, *pull(dy)


def exact_swiglu(x, w1, w3, w2, dy):
    """Compute the same in float64, from the formulas."""
    x, w1, w3, w2, dy = (np.asarray(a, np.float64) for a in (x, w1, w3, w2, dy))
    x, dy = x.reshape(-1, D), dy.reshape(-1, D)
    gate, up = x @ w1, x @ w3
    sigmoid = 1 / (1 + np.exp(-gate))
    act, dact = sigmoid * gate * up, dy @ w2.T
    dgate, dup = dact * up * sigmoid * (1 + gate * (1 - sigmoid)), dact * sigmoid * gate
    dx = dgate @ w1.T + dup @ w3.T
    return (act @ w2).reshape(B, T, D), dx.reshape(B, T, D), x.T @ dgate, x.T @ dup, act.T @ dy


@pytest.mark.parametrize("dtype", [fp8.ACTIVATION, fp8.GRADIENT])
@pytest.mark.parametrize("bound", [1e-20, 0.7, 1.0, 255.9, 256.0, 448.0, 57344.0, 1e30, 3e38])
def test_a_scale_is_the_smallest_power_of_two_that_fits_the_bound(bound, dtype):
    """It leaves the room above the top exponent free, and half of it would exceed that."""
    scale = float(fp8.scale_of(jnp.float32(bound), dtype))
    top = 2.0 ** (8 if dtype == fp8.ACTIVATION else 15)
    assert np.frexp(scale)[0] == 0.5
    assert np.float32(bound) / scale < top <= np.float32(bound) / (scale / 2)
    assert 1.7 * top < float(jnp.finfo(dtype).max)


def test_scales_of_zero_and_of_bounds_that_are_not_finite():
    assert float(fp8.scale_of(jnp.float32(0), fp8.ACTIVATION)) == 2.0**-100
    assert float(fp8.scale_of(jnp.float32(1e-38), fp8.GRADIENT)) == 2.0**-100
    for bound in (np.inf, np.nan):
        assert np.isnan(fp8.scale_of(jnp.float32(bound), fp8.ACTIVATION))


@pytest.mark.parametrize(("dtype", "error"), [(fp8.ACTIVATION, E4M3), (fp8.GRADIENT, E5M2)])
def test_quantizing_rounds_to_the_nearest(dtype, error):
    x = draw(0, (4, 256), 3e-5)
    q = fp8.quantize(x, fp8.scale_of(fp8.largest(x), dtype), dtype)
    back = np.asarray(q.values, np.float64) * float(q.scale)
    off = np.abs(back / np.asarray(x, np.float64) - 1)
    assert q.values.dtype == dtype
    assert error / 2 < off.max() <= error


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_product_and_its_gradients_are_within_the_error_of_their_mantissas(scale):
    """Every element, against float64: rounding of two operands, and nothing but that.

    With x as small or large as `scale`, which the result must follow.
    """
    x, w, dy = draw(1, (B, T, D), scale), draw(2, (D, F), 0.02), draw(3, (B, T, F), 1e-6)
    y, dx, dw = product_and_gradients(x, w, dy)
    x, w, dy = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, w, dy))
    for got, left, right, error in (
        (y, x, w, (1 + E4M3) ** 2 - 1),
        (dx, dy, w.T, (1 + E5M2) * (1 + E4M3) - 1),
        (dw, x.T, dy, (1 + E4M3) * (1 + E5M2) - 1),
    ):
        off = np.abs(np.asarray(got, np.float64).reshape(len(left), -1) - left @ right)
        assert np.all(off <= (error + 1e-5) * (np.abs(left) @ np.abs(right)))
        assert 0.01 < relative(np.reshape(got, (len(left), -1)), left @ right) < 0.08


def test_gradients_are_the_products_of_the_quantized_operands():
    """Nothing but quantizing: with operands that 8 bits hold exactly, all three are exact."""
    x, w, dy = (jnp.round(4 * draw(i, s)) for i, s in enumerate([(B, T, D), (D, F), (B, T, F)]))
    y, dx, dw = product_and_gradients(x, w, dy)
    np.testing.assert_array_equal(y, jnp.einsum("BTD,DF->BTF", x, w))
    np.testing.assert_array_equal(dx, jnp.einsum("BTF,DF->BTD", dy, w))
    np.testing.assert_array_equal(dw, jnp.einsum("BTD,BTF->DF", x, dy))


def test_swiglu_and_its_gradients_against_float64():
    """Each result has the rounding errors of what it is made of: in quadrature, 6 to 10%."""
    args = (draw(1, (B, T, D)), draw(2, (D, F)), draw(3, (D, F)), draw(4, (F, D)))
    args = (args[0], *(w / 4 for w in args[1:]), draw(5, (B, T, D), 1e-7))
    got, want = swiglu_and_gradients(*args), exact_swiglu(*args)
    for name, a, b in zip(("y", "dx", "dw1", "dw3", "dw2"), got, want, strict=True):
        assert 0.03 < relative(a, b) < 0.12, name


def test_swiglu_with_one_activation_a_thousand_times_as_large():
    """As the massive activations of trained models: the gradients of the other tokens survive."""
    x = draw(1, (B, T, D)).at[0, 0].multiply(50.0)
    args = (x, *(draw(i, s, 0.25) for i, s in ((2, (D, F)), (3, (D, F)), (4, (F, D)))))
    args = (*args, draw(5, (B, T, D), 1e-7).at[1, 1].multiply(30.0))
    dx, want = swiglu_and_gradients(*args)[1], exact_swiglu(*args)[1]
    for b, t in ((0, 0), (0, 1), (1, 1), (1, T - 1)):
        assert relative(dx[b, t], want[b, t]) < 0.2


def test_the_bounds_of_swiglu_hold_where_they_are_reached():
    """A gradient along a row of w2, and gates at the steepest slope of silu: nothing overflows."""
    steepest = 2.3994  # where the slope of silu is 1.0998
    x = jnp.ones((B, T, D))
    w1, w3 = jnp.full((D, F), steepest / D), jnp.full((D, F), 3.0 / D)
    w2 = jnp.ones((F, D))
    args = (x, w1, w3, w2, jnp.full((B, T, D), 1e-6))
    got, want = swiglu_and_gradients(*args), exact_swiglu(*args)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 0.2


def test_the_bound_of_a_norm_holds_where_it_is_reached():
    """One channel that is not zero is sqrt(D) times its root mean square."""
    weight = draw(1, (D,)).at[3].set(-2.0)
    x = jnp.zeros((1, 1, D)).at[0, 0, 3].set(1e4)
    bound = float(fp8.norm_bound(weight))
    largest = float(jnp.abs(rms_norm(x, weight, eps=1e-5)).max())
    assert largest <= bound * (1 + 1e-6) and largest > 0.99 * bound


def test_of_zeros_all_is_zero():
    x, w = jnp.zeros((B, T, D)), draw(1, (D, F))
    for result in product_and_gradients(x, w, jnp.zeros((B, T, F))):
        assert not np.asarray(result).any()
    zeros = (jnp.zeros((D, F)), jnp.zeros((D, F)), jnp.zeros((F, D)))
    for result in swiglu_and_gradients(x, *zeros, jnp.zeros((B, T, D))):
        assert not np.asarray(result).any()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_shows_in_every_result_that_it_enters(value):
    """As the guard of the training step needs it: no inf becomes the largest 8-bit number."""
    x, w, dy = draw(1, (B, T, D)), draw(2, (D, F)), draw(3, (B, T, F))
    y, _, dw = product_and_gradients(x.at[0, 0, 0].set(value), w, dy)
    assert np.isnan(y).any() and np.isnan(dw).any()
    _, dx, dw = product_and_gradients(x, w, dy.at[0, 0, 0].set(value))
    assert np.isnan(dx).any() and np.isnan(dw).any()
    w2, dy = draw(4, (F, D)), draw(5, (B, T, D))
    for i in range(5):
        args = [x, w, w, w2, dy]
        args[i] = args[i].at[0, 0].set(value)
        y, *gradients = swiglu_and_gradients(*args)
        assert all(np.isnan(result).any() for result in (gradients if i == 4 else [y]))


def test_swiglu_quantizes_x_once_for_both_weights():
    def forward(x, w1, w3, w2):
        return fp8.swiglu(x, w1, w3, w2, fp8.largest(x))

    shapes = ((B, T, D), (D, F), (D, F), (F, D))
    jaxpr = jax.make_jaxpr(forward)(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes))
    text = str(jaxpr)
    assert text.count(f":f8_e4m3fn[{B},{T},{D}] = convert_element_type") == 1
    assert text.count("preferred_element_type=bfloat16") == 3


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (1, 2, 1, 4)])
def test_results_do_not_depend_on_the_mesh(make_mesh, sizes):
    """Scales are of whole tensors. What differs is the order of sums, which may round apart."""
    rows = 8
    x, dy = draw(1, (rows, T, D)), draw(5, (rows, T, D), 1e-6)
    weights = tuple(draw(i, s, 0.25) for i, s in ((2, (D, F)), (3, (D, F)), (4, (F, D))))
    w, dz = draw(6, (D, 8, 4)), draw(7, (rows, T, 8, 4))

    def both(x, w1, w3, w2, dy, w, dz):
        heads = ("batch", "seq", "heads", None)
        y, pull = jax.vjp(lambda *a: fp8.swiglu(*a, fp8.largest(x)), x, w1, w3, w2)
        z, pull_z = jax.vjp(lambda x, w: fp8.product(x, w, fp8.largest(x), heads), x, w)
        return y, pull(dy), z, pull_z(dz)

    alone = jax.jit(both)(x, *weights, dy, w, dz)
    mesh = make_mesh(*sizes)
    axes = (("batch", "seq", None), (None, "ffn"), (None, "ffn"), ("ffn", None))
    axes += (("batch", "seq", None), (None, "heads", None), ("batch", "seq", "heads", None))
    args = (x, *weights, dy, w, dz)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, sharding.spec(n, mesh)) for a, n in zip(args, axes, strict=True)
        ]
        split = jax.jit(both)(*placed)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        assert relative(a, b) < 5e-3


CONFIG = dataclasses.replace(PRESETS["nano"], num_layers=1)


def model_of(**options):
    execution = Execution(attn="xla", dtype="float32", **options)
    return InternLM2(CONFIG, rngs=nnx.Rngs(params=0), execution=execution)


TOKENS = np.arange(48, dtype=np.int32).reshape(2, 24)


def test_the_model_in_fp8_stays_near_itself_and_rounds():
    exact = model_of().hidden(TOKENS)
    assert 0.005 < relative(model_of(matmul="fp8").hidden(TOKENS), exact) < 0.1


@pytest.mark.parametrize("remat", [name for name in REMAT if "offload" not in name])
def test_gradients_do_not_depend_on_remat(remat):
    """Saved and recomputed values are the same bits, also numbers from 240 to 448."""

    def block(x, w, w1, w3, w2):
        y = fp8.product(x, w, fp8.largest(x), OUT)
        return fp8.swiglu(y, w1, w3, w2, fp8.largest(y))

    args = (draw(0, (B, T, D)), draw(1, (D, D)))
    args += tuple(draw(i, s, 0.25) for i, s in ((2, (D, F)), (3, (D, F)), (4, (F, D))))

    def gradients(f):
        return jax.jit(lambda args, dy: jax.vjp(f, *args)[1](dy))(args, draw(5, (B, T, D)))

    again = gradients(jax.checkpoint(block, policy=REMAT[remat]))
    for a, b in zip(again, gradients(block), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_every_policy_keeps_the_maxima(remat):
    """The gradient has no pass over a tensor for its maximum that the forward pass has had."""

    def maxima(policy):
        def loss(*args):
            return jax.checkpoint(swiglu, policy=policy)(*args).sum()

        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args)).count("reduce_max[")

    def swiglu(x, w1, w3, w2):
        return fp8.swiglu(x, w1, w3, w2, fp8.largest(x))

    shapes = ((B, T, D), (D, F), (D, F), (F, D))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert maxima(REMAT[remat]) == maxima(REMAT["none"])


def test_generation_computes_in_its_own_type():
    """Prefill and decoding have few tokens, and answers do not depend on how a model was trained.

    The same bits as without fp8, where training's logits are others.
    """
    models = [
        init(CONFIG, execution=Execution(attn="xla", dtype="float32", matmul=m))
        for m in ("fp8", "bf16")
    ]
    tokens = jnp.asarray(TOKENS)
    (one, _), (two, _) = (prefill(m, tokens, jnp.ones_like(tokens), capacity=256) for m in models)
    np.testing.assert_array_equal(one, two)
    assert relative(models[0].hidden(TOKENS), models[1].hidden(TOKENS)) > 0.005


def test_an_unknown_matmul_is_refused():
    with pytest.raises(ValueError, match="matmul='fp4' must be one of bf16, fp8"):
        Execution(matmul="fp4")


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_beside_frozen_weights(quantize):
    """Their gradients are near those of exact products, and no frozen weight gets a gradient."""
    config = dataclasses.replace(CONFIG, hidden_size=256, num_heads=4, num_kv_heads=2)

    def gradients(matmul):
        lora = LoRA(rank=4, alpha=8.0)
        execution = Execution(
            attn="xla", dtype="float32", lora=lora, quantize=quantize, matmul=matmul
        )
        model = InternLM2(config, rngs=nnx.Rngs(params=0), execution=execution)
        for adapters in (model.blocks.attention.lora, model.blocks.ffn.lora):
            for adapter in adapters.values():
                adapter.b[...] = draw(7, adapter.b.shape, 0.1)
        graphdef, trained, frozen = nnx.split(model, LoRAParam, ...)

        def loss(trained):
            return jnp.square(nnx.merge(graphdef, trained, frozen).hidden(TOKENS)).mean()

        return jax.make_jaxpr(loss)(trained), jax.grad(loss)(trained)

    (_, exact), (forward, rounded) = gradients("bf16"), gradients("fp8")
    for got, want in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert 0.001 < relative(got, want) < 0.25
    assert str(forward).count("f8_e4m3fn") > 5


def test_a_frozen_weight_costs_no_product_for_its_gradient():
    """XLA removes it: the compiled gradient by x alone has one product less."""
    x, w, dy = draw(1, (B, T, D)), draw(2, (D, F)), draw(3, (B, T, F))

    def products(wrt):
        def loss(*args):
            return jnp.vdot(fp8.product(*args, fp8.largest(args[0]), OUT), dy)

        compiled = jax.jit(jax.grad(loss, argnums=wrt)).lower(x, w).compile()
        return compiled.as_text().count(" dot(") + compiled.as_text().count("__onednn$matmul")

    assert products((0,)) == products((0, 1)) - 1
