"""The kernels lower for CUDA on a machine without a GPU, alone and inside what a model does.

Lowering runs Mosaic GPU's layout inference and checks; nothing is executed.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxattn import Mask, attention, prepare
from jaxattn.pallas.op import LSE_NAME, OUT_NAME
from jaxattn.pallas.tile_scheduler import persistent_schedule
from jaxattn.ranges import SENTINEL

pytestmark = pytest.mark.usefixtures("on_hopper")


def _qkv(n=4, k=2, h=128, dtype=jnp.bfloat16, b=1, t=300):
    return [jax.ShapeDtypeStruct((b, t, heads, h), dtype) for heads in (n, k, k)]


def _lower(function, *args) -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def _gradients(ids=None, window=None, blocks=None, deterministic=False, impl="pallas"):
    def loss(q, k, v):
        mask = Mask(segment_ids=ids, window=window, blocks=blocks)
        out = attention(q, k, v, mask, impl=impl, deterministic=deterministic)
        return out.astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("impl", ["pallas", "pallas_mma"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "documents"),
    [
        ((2, 2), 128, jnp.bfloat16, False),
        ((4, 2), 128, jnp.float16, True),
        ((4, 1), 128, jnp.bfloat16, True),
        ((12, 2), 128, jnp.bfloat16, True),
        ((8, 1), 128, jnp.bfloat16, False),
        ((2, 2), 64, jnp.bfloat16, True),
        ((12, 2), 64, jnp.bfloat16, True),
        ((8, 1), 64, jnp.float16, False),
    ],
)
def test_forward_and_backward_lower(heads, head_dim, dtype, documents, impl):
    """For both head_dims and dtypes, every group, with and without documents and a window."""
    ids = jnp.ones((1, 300), jnp.int32) if documents else None
    gradients = _gradients(ids, 50 if documents else None, impl=impl)
    text = _lower(gradients, *_qkv(*heads, head_dim, dtype))
    assert text.count("mosaic_gpu") >= 2, "both kernels are in the program"


@pytest.mark.parametrize("impl", ["pallas", "pallas_mma"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "documents", "deterministic"),
    [
        ((2, 2), 128, False, False),
        ((4, 1), 128, True, False),
        ((8, 1), 64, True, False),
        ((4, 1), 128, True, True),
    ],
)
def test_block_patterns_lower(heads, head_dim, documents, deterministic, impl):
    """With a pattern the kernels look their columns up, with and without documents."""
    ids = jnp.ones((1, 300), jnp.int32) if documents else None
    blocks = jnp.ones((3, 3), bool)
    gradients = _gradients(ids, blocks=blocks, deterministic=deterministic, impl=impl)
    text = _lower(gradients, *_qkv(*heads, head_dim))
    assert text.count("mosaic_gpu") >= 2 + deterministic, "all kernels are in the program"


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "documents"),
    [
        ((12, 2), 128, jnp.bfloat16, True),
        ((8, 1), 128, jnp.float16, False),
        ((2, 2), 64, jnp.float16, True),
        ((4, 1), 64, jnp.bfloat16, False),
    ],
)
def test_deterministic_backward_lowers(heads, head_dim, dtype, documents):
    """For both head_dims and dtypes, with and without documents and a window."""
    ids = jnp.ones((1, 300), jnp.int32) if documents else None
    gradients = _gradients(ids, 50 if documents else None, deterministic=True)
    text = _lower(gradients, *_qkv(*heads, head_dim, dtype))
    assert text.count("mosaic_gpu") >= 3, "all three kernels are in the program"


def _layers(policy, **options):
    """Two layers under scan and remat, as a model has them."""

    def layer(x, w):
        q, k, v = (x * w[i] for i in range(3))
        out = attention(q, k, v, Mask(), impl="pallas", **options)
        if options.get("return_lse"):
            out = out[0] * jnp.tanh(out[1])[..., None].astype(out[0].dtype)
        return x + out, None

    body = jax.checkpoint(layer, policy=policy)

    def loss(x, w):
        return jax.lax.scan(body, x, w)[0].astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1))


@pytest.mark.parametrize(
    ("options", "backward_kernels"),
    [
        ({}, {"flash_backward": 1}),
        ({"return_lse": True}, {"flash_backward": 1}),
        ({"deterministic": True}, {"flash_backward_dkv": 1, "flash_backward_dq": 1}),
    ],
    ids=["fast", "with lse", "deterministic"],
)
@pytest.mark.parametrize("saved", [True, False])
def test_saved_results_spare_the_forward_kernel_under_remat(saved, options, backward_kernels):
    """With "attn_out" and "attn_lse" saved a layer runs the forward kernel once, else twice."""
    names = jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((2, 3, 1, 1, 1, 128), jnp.bfloat16)
    gradients = _layers(names if saved else None, **options)
    kernels = _count_kernels(jax.make_jaxpr(gradients)(x, w).jaxpr)
    assert kernels == {"flash_forward": 1 if saved else 2, **backward_kernels}
    assert (OUT_NAME, LSE_NAME) == ("attn_out", "attn_lse")


def test_lowers_under_scan_remat_and_an_explicit_mesh():
    """Batch and heads split four ways; every device's kernel works on its own rows and heads."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", None, "tensor", None)
        q, k, v = (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
            for x in _qkv(n=8, k=4, b=4)
        )
        rows = NamedSharding(mesh, PartitionSpec("data", None))
        ids = jax.device_put(jnp.ones((4, 300), jnp.int32), rows)

        def loss(q, k, v, ids):
            mask = prepare(Mask(segment_ids=ids), q, k, impl="pallas")

            @jax.checkpoint
            def layer(q, _):
                return attention(q, k, v, mask, impl="pallas"), None

            return jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32).sum()

        text = _lower(jax.grad(loss, argnums=(0, 1, 2)), q, k, v, ids)
    assert text.count("mosaic_gpu") >= 2
    assert re.search(r"600x4x128xbf16|608x4x128xbf16", text), (
        "a device has 2 of 4 rows, 4 of 8 heads"
    )


@pytest.mark.parametrize("impl", ["pallas", "pallas_mma"])
def test_lowers_with_sharded_positions(impl):
    """Two devices, packed documents, remat: kernels of whole rows and half of the heads."""
    mesh = jax.make_mesh((1, 2), ("data", "seq"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, PartitionSpec(None, "seq", None, None))
        q, k, v = (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec) for x in _qkv(n=8, k=4, t=512)
        )
        ids = jax.ShapeDtypeStruct(
            (1, 512), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(None, "seq"))
        )

        def loss(q, k, v, ids):
            mask = prepare(Mask(segment_ids=ids), q, k, impl=impl)
            layer = jax.checkpoint(lambda q: attention(q, k, v, mask, impl=impl))
            return layer(q).astype(jnp.float32).sum()

        text = _lower(jax.grad(loss, argnums=(0, 1, 2)), q, k, v, ids)
    assert text.count("mosaic_gpu") >= 2 and text.count("all_to_all") >= 4
    assert "512x4x128xbf16" in text and "512x8x128xbf16" in text


def _count_kernels(jaxpr) -> dict[str, int]:
    """Kernels by name in a jaxpr and all inside it."""
    found: dict[str, int] = {}
    for eqn in jaxpr.eqns:
        name = eqn.params.get("name")
        if isinstance(name, str) and name.startswith("flash_"):
            found[name] = found.get(name, 0) + 1
            continue
        for inner in jaxprs_in_params(eqn.params):
            for name, count in _count_kernels(inner).items():
                found[name] = found.get(name, 0) + count
    return found


@pytest.mark.parametrize("impl", ["pallas", "pallas_mma"])
def test_rows_of_a_million_tokens(impl):
    """Elements (2^32 in q) are counted in 64 bits; what is counted in int32 is far smaller."""
    T, heads = 1 << 20, 32
    lowered = jax.jit(_gradients(impl=impl)).trace(*_qkv(heads, 8, t=T))
    lowered.lower(lowering_platforms=("cuda",))
    work_tiles = persistent_schedule(T // 128, heads, 132)
    assert work_tiles.max() == T // 128 * heads - 1 and T < SENTINEL
