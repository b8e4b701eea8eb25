"""Logical axes become mesh axes, and what cannot be split is refused."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from models import sharding
from models.config import PRESETS
from models.internlm2 import init


def test_spec_follows_the_rules(make_mesh):
    mesh = make_mesh(2, 2, 2)
    assert sharding.spec(("batch", None, "heads"), mesh) == P(("data", "fsdp"), None, "tensor")
    assert sharding.spec(("embed", "ffn"), mesh) == P("fsdp", "tensor")
    mesh = make_mesh(1, 2, 2, 2)
    assert sharding.spec(("batch", "seq", "heads"), mesh) == P("fsdp", "seq", "tensor")
    assert sharding.spec(("embed", "ffn"), mesh) == P(("fsdp", "seq"), "tensor")


def test_spec_ignores_axes_that_the_mesh_lacks_or_that_split_nothing(make_mesh):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    assert sharding.spec(("batch", None, "heads"), mesh) == P("data", None, None)
    assert sharding.spec(("batch", None, "heads"), make_mesh(1, 1, 8)) == P(None, None, "tensor")


def test_spec_refuses_a_collision_and_an_unknown_name(make_mesh):
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        sharding.spec(("heads", "ffn"), mesh)
    with pytest.raises(ValueError, match=r"unknown logical axes \['head'\]"):
        sharding.spec(("head",), mesh)


def test_every_weight_of_the_released_models_divides_over_8_devices(make_mesh):
    """And the layer axis is never split."""
    for name in ("internlm2-1.8b", "internlm2-7b", "internlm2-20b"):
        for mesh in (make_mesh(1, 8, 1), make_mesh(1, 1, 8), make_mesh(2, 2, 2)):
            model = jax.eval_shape(lambda name=name: init(PRESETS[name]))
            places = sharding.shardings(model, mesh)
            want = [a if mesh.shape[a] > 1 else None for a in ("fsdp", "tensor")]
            assert places.blocks.ffn.w1_DF.get_value().spec == P(None, *want)
            big = [s.spec for s in jax.tree.leaves(places) if len(s.spec) > 2]
            assert all(spec[0] is None for spec in big)


def test_all_indivisible_dimensions_are_named_at_once(make_mesh):
    model = jax.eval_shape(lambda: init(PRESETS["nano"]))
    with pytest.raises(ValueError) as error:
        sharding.shardings(model, make_mesh(1, 1, 8))
    message = str(error.value)
    assert "wqkv_DKgH" in message and "wo_NHD" in message
    assert "size 2 in dimension 2 (heads), which must be a multiple of 8" in message
    assert "smaller 'tensor' axis" in message


def test_an_indivisible_batch_is_refused(make_mesh):
    with (
        jax.set_mesh(make_mesh(2, 2, 2)),
        pytest.raises(ValueError, match="size 3 in dimension 0"),
    ):
        sharding.constrain(jnp.zeros((3, 8)), "batch", None)


def test_an_optimizer_state_is_placed_like_its_parameters(make_mesh):
    """A tree of mixed leaves: moments like their weights, a bare counter replicated."""
    model = jax.eval_shape(lambda: init(PRESETS["nano"]))
    state = {"mu": model, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    places = sharding.shardings(state, make_mesh(1, 4, 2))
    assert places["count"].spec == P()
    assert places["mu"].output_DV.get_value().spec == P("fsdp", "tensor")


def test_everything_is_a_no_op_without_a_mesh():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.gathered(x, "embed", None) is x
    assert sharding.multiple("batch", x) == sharding.multiple("seq", x) == 1
    assert sharding.struct((3, 5), jnp.float32, "batch", None).sharding is None
