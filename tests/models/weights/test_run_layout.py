"""The file layout of a training run."""

import dataclasses

import pytest

from models.config import PRESETS
from models.weights.run_layout import find_checkpoint, model_identity, model_of


@pytest.mark.parametrize("change", [{}, {"rope_scaling": None}, {"bias": True}])
def test_the_model_of_an_identity(change):
    """Through JSON's types, and beside other entries."""
    config = dataclasses.replace(PRESETS["nano"], **change)
    assert model_of(model_identity(config) | {"seed": 3, "tokenizer": "byte-1"}) == config


def test_an_identity_of_another_version_is_refused():
    identity = model_identity(PRESETS["nano"])
    for wrong in (identity | {"model.moe": 1}, {"model.vocab_size": 3}):
        with pytest.raises(TypeError):
            model_of(wrong)


def test_the_latest_checkpoint_is_found(tmp_path):
    """By number; what is put aside under another name is not one."""
    for name in ("9", "10", "corrupt-11"):
        (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "run").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "10"
    step = tmp_path / "checkpoints" / "9"
    assert find_checkpoint(step) == step
    assert find_checkpoint(tmp_path / "nowhere") is None
