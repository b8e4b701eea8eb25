"""A run's checkpoint leaves as HF weights: `python -m models.convert` knows its layout."""

import dataclasses
import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from models import convert
from models.execution import Execution
from models.weights.hf_files import HFDirectory
from models.weights.load import load_hf
from models.weights.run_layout import find_checkpoint
from models.weights.table import hf_tensors
from train.checkpoint.checkpoints import Checkpoints
from train.run import loop


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # by raw_params
def test_a_run_becomes_hf_weights(finished, tiny, tmp_path, capsys):
    """The run's directory means its last checkpoint; float32 as trained; nothing is rounded."""
    assert convert.main([str(finished), str(tmp_path / "hf")]) == 0
    assert "wrote" in capsys.readouterr().out
    files = HFDirectory(tmp_path / "hf")
    assert set(files.dtypes.values()) == {"float32"}
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {
        k: v for k, v in tiny.to_hf(dtype="float32").items() if k != "auto_map"
    }
    model = load_hf(tmp_path / "hf", execution=Execution(dtype="float32"))
    assert model.config == tiny
    params = raw_params(finished / "checkpoints" / "8")
    for name, weight, i in hf_tensors(tiny):
        leaf = params
        for part in weight.path.split("."):
            leaf = leaf[part]
        want = weight.to_hf(np.asarray(leaf if i is None else leaf[i]), tiny)
        [(_, got)] = files.read({name})
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_one_checkpoint_of_a_run_as_llama_in_bfloat16(finished, tmp_path):
    steps = sorted(int(p.name) for p in (finished / "checkpoints").iterdir())
    source = finished / "checkpoints" / str(steps[0])
    flags = ["--layout=llama", "--dtype=bfloat16"]
    assert convert.main([str(source), str(tmp_path / "hf"), *flags]) == 0
    files = HFDirectory(tmp_path / "hf")
    assert files.config["model_type"] == "llama"
    assert set(files.dtypes.values()) == {"bfloat16"}
    assert find_checkpoint(finished) == finished / "checkpoints" / str(steps[-1])


def test_exported_weights_train_on(finished, tiny_run, tmp_path):
    """HF out of a run is HF into a run."""
    convert.convert(finished, tmp_path / "hf")
    config = tiny_run(tmp_path / "more")
    shutil.rmtree(tmp_path / "more", ignore_errors=True)
    changes = {"model": str(tmp_path / "hf"), "tokenizer": "byte", "steps": 1}
    loop.run(dataclasses.replace(config, **changes))
    line = (tmp_path / "more" / "metrics.jsonl").read_text().splitlines()[0]
    first = (finished / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["loss"] < json.loads(first)["loss"]


@pytest.mark.parametrize("lost", ["state/manifest.ocdbt", "run/metadata"])
def test_a_broken_checkpoint_is_one_line(finished, tmp_path, capsys, lost):
    step = shutil.copytree(finished / "checkpoints" / "8", tmp_path / "8")
    (step / lost).unlink()
    assert convert.main([str(step), str(tmp_path / "hf")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(step) in err
    assert not (tmp_path / "hf").exists()


def raw_params(step):
    """Read the weights of a checkpoint without a description of its content."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(step / "state")["params"]


def test_the_layout_is_the_one_that_training_writes(finished):
    """train.checkpoint.checkpoints and models.weights.train_checkpoint find the same checkpoint."""
    found = find_checkpoint(finished)
    assert found is not None and int(found.name) == Checkpoints(finished, keep_last=2).latest
