"""Validation: the loss of each set is the mean over its loss tokens, in a run and by itself."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.tokenizer import load_tokenizer
from train.config.config import Config
from train.config.sections import DataConfig, MeshConfig
from train.data.open import open_data
from train.distributed.mesh import make_mesh
from train.metrics.evaluate import Evaluation
from train.run import loop
from train.step.loss import cross_entropy


@pytest.fixture
def files(tmp_path):
    paths = []
    for name, count in (("one", 30), ("two", 7)):
        rows = [{"question": f"Q{i}", "answer": name * (i % 3 + 1)} for i in range(count)]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(map(json.dumps, rows)))
    return paths


def test_the_loss_is_the_mean_over_loss_tokens(files, tiny_model, tmp_path):
    """The last batch is not full: the mean is not one of batch means."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, seq=2, tensor=1))
    graphdef, state = nnx.split(tiny_model)
    params = nnx.to_pure_dict(state)
    with open_data([files[0]], load_tokenizer("byte"), seq_len=64, batch_size=16) as loader:
        assert loader.report.rows % 16
        evaluate = Evaluation(
            {"one": loader}, graphdef, grad_accum=2, mesh=mesh, path=tmp_path / "e.jsonl", start=0
        )
        on_mesh = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        got = evaluate(3, on_mesh)["one"]
        total = 0.0
        for batch in loader.one_epoch():
            batch = jax.tree.map(jnp.asarray, batch)
            x = tiny_model.hidden(
                batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
            )
            loss = cross_entropy(x, tiny_model.unembedding(), batch.targets, batch.loss_mask)
            total += float(loss)
        np.testing.assert_allclose(got, total / loader.report.loss_tokens, rtol=1e-5)
        line = json.loads((tmp_path / "e.jsonl").read_text())
        assert line.pop("perplexity") == pytest.approx(math.exp(line["loss"]))
    assert line == {
        "step": 3,
        "set": "one",
        "loss": got,
        "loss_tokens": loader.report.loss_tokens,
    }


def test_a_run_evaluates_named_sets(tiny_run, files, tmp_path, capsys):
    """Every so many steps and at the end; a second run goes on without repeating lines."""
    config = dataclasses.replace(
        tiny_run(tmp_path / "out"),
        data=DataConfig(files=(str(files[0]),), val=tuple(map(str, files))),
        eval_every=5,
    )
    loop.run(config)
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "eval.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["set"]) for line in lines] == [
        (5, "one"),
        (5, "two"),
        (8, "one"),
        (8, "two"),
    ]
    assert "validation on two: 7 documents" in capsys.readouterr().out
    assert lines[2]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("val", "share"), [(None, 0.0), (("0.1",), 0.1), (("a.json",), 0.0), (("0.1", "0.2"), 0.0)]
)
def test_a_share_or_files(val, share):
    assert DataConfig(val=val).hold_out == share


def test_a_number_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match="--data.val=2 must be a share in"):
        Config(data=DataConfig(val=("2",)))
