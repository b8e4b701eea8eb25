"""python -m models.convert: what it writes loads back, and what fails leaves nothing behind."""

import json
import shutil

import jax
import numpy as np
import pytest

from models import convert
from models.load import load, load_hf, load_orbax


@pytest.fixture
def source(tmp_path, tiny_dir):
    shutil.copytree(tiny_dir, tmp_path / "src")
    (tmp_path / "src" / "tokenizer.model").write_bytes(b"tokenizer")
    return tmp_path / "src"


def test_a_converted_model_is_the_same(source, tmp_path, make_mesh, capsys):
    """Exactly, on one device and on a mesh; tokenizer and generation config go along."""
    destination = tmp_path / "new" / "dst"
    assert convert.main([str(source), str(destination)]) == 0
    assert f"wrote {destination}" in capsys.readouterr().out
    want = load_hf(source, dtype="float32")
    for mesh in (None, make_mesh(1, 4, 2)):
        got = load(destination, dtype="float32", mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got.output_DV.get_value().sharding.num_devices == 8
    assert {p.name for p in destination.iterdir()} == {
        "config.json",
        "generation_config.json",
        "params",
        "tokenizer.model",
    }
    assert json.loads((destination / "config.json").read_text())["torch_dtype"] == "float32"
    assert load_orbax(destination).norm_D.dtype == "bfloat16"


def test_an_existing_destination_is_refused(source, tmp_path, capsys):
    destination = tmp_path / "dst"
    destination.mkdir()
    assert convert.main([str(source), str(destination)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {destination} exists: choose another name or remove it\n"
    assert not list(destination.iterdir())


@pytest.mark.parametrize("stage", ["load_hf", "save_orbax", "shutil.copyfile"])
def test_a_failure_leaves_nothing_behind(source, tmp_path, monkeypatch, capsys, stage):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"models.convert.{stage}", fail)
    before = sorted(tmp_path.iterdir())
    assert convert.main([str(source), str(tmp_path / "dst")]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert sorted(tmp_path.iterdir()) == before


def test_bad_weights_are_one_line(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert convert.main([str(source), str(tmp_path / "dst")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "missing: model.layers.2.attention_norm.weight [64]" in err
    assert not (tmp_path / "dst").exists()


def test_usage_errors_exit_2(capsys):
    with pytest.raises(SystemExit) as stop:
        convert.main(["only-one"])
    assert stop.value.code == 2
    assert "DST" in capsys.readouterr().err


def test_help_names_both_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        convert.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "HF directory" in out and "must not exist" in out
