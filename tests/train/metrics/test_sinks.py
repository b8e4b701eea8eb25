"""TensorBoard and Weights & Biases get the run's numbers; without their packages: one line."""

import sys
import types

import pytest

from train.main import main
from train.metrics.sinks import check_sinks, open_sinks


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    [sink] = open_sinks(["tensorboard"], tmp_path, start=0, settings={"seed": 1})
    sink.write(1, {"train/loss": 2.5})
    sink.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes() and b"seed=1" in file.read_bytes()


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch):
    """Against a stand-in for the package, which needs an account."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: "abc"),
        init=lambda **kwargs: calls.append((kwargs["id"], kwargs["resume"])) or run,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        [sink] = open_sinks(["wandb"], tmp_path, start=0, settings={})
        fake.util.generate_id = lambda: "another"
    sink.write(3, {"a": 1.0})
    sink.close()
    assert calls == [("abc", "allow"), ("abc", "allow"), (3, {"a": 1.0}), "end"]


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_package(name, package, monkeypatch, capsys, tmp_path, tiny):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"--log {name} needs .*: pip install {package}"):
        check_sinks([name])
    assert main(["--model=tiny", "--log", name, f"--out={tmp_path / 'out'}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()
