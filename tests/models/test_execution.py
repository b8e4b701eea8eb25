"""Execution options: checked when made, and the same in every constructor and loader."""

import jax.numpy as jnp
import pytest
from flax import nnx

from models.config import PRESETS
from models.convert import convert
from models.execution import Execution
from models.internlm2 import InternLM2, init
from models.weights.abstract import abstract
from models.weights.load import load

EVERY = Execution(
    attn="eager",
    dtype="float32",
    param_dtype="float32",
    remat="dots",
    scan=False,
    deterministic=True,
)


def test_an_unknown_policy_or_dtype_is_refused():
    with pytest.raises(ValueError, match="remat=some must be one of none, dots, "):
        Execution(remat="full,some")
    with pytest.raises(ValueError, match="remat='dots' would save what tiles recompute"):
        Execution(remat="dots", tile_size=64)
    with pytest.raises(ValueError, match="tile_size=0 must be at least 1"):
        Execution(tile_size=0)
    execution = Execution()
    object.__setattr__(execution, "attn", "flash3")  # the type checks of the tests would come first
    with pytest.raises(ValueError, match="attn='flash3' must be one of auto, pallas, "):
        execution.__post_init__()
    with pytest.raises(TypeError, match="bfloat17"):
        Execution(dtype="bfloat17")


def test_spellings_of_a_dtype_are_equal():
    """Two models whose dtypes are spelled differently share one compiled program."""
    assert Execution(dtype=jnp.bfloat16) == Execution(dtype="bfloat16")
    assert hash(Execution(dtype=jnp.bfloat16)) == hash(Execution(dtype="bfloat16"))


def test_every_loader_and_constructor_takes_every_option(tiny_dir, tmp_path):
    """Loaders of HF and of orbax take one set of arguments, `progress` too."""
    convert(tiny_dir, tmp_path / "orbax")
    models = [load(d, execution=EVERY, progress=True) for d in (tiny_dir, tmp_path / "orbax")]
    models.append(init(PRESETS["nano"], execution=EVERY))
    models.append(InternLM2(PRESETS["nano"], rngs=nnx.Rngs(0), execution=EVERY))
    models.append(abstract(PRESETS["nano"], EVERY))
    assert all(model.execution == EVERY for model in models)
    assert all(model.norm_D.dtype == "float32" for model in models)
