"""Data loaders of a run, and the step that it compiles."""

import dataclasses
import json

import pytest

from train.config.command_line import parse_flags
from train.config.sections import DataConfig
from train.metrics.evaluate import OpenSets
from train.run import build
from train.run.build import open_training, open_validation
from train.run.resolve import resolve


@pytest.mark.parametrize("share", [True, False])
def test_validation_is_packed_alike_whatever_training_does(tiny_run, tmp_path, share):
    """Files as well as a share: the losses of two runs can be compared."""
    path = tmp_path / "a.jsonl"
    rows = [{"question": f"Q{i}", "answer": "A" * (i % 17 + 1)} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    val = ("0.5",) if share else (str(path),)

    def opened(packing: str) -> tuple[str, str]:
        data = DataConfig(files=(str(path),), val=val, packing=packing)
        config = dataclasses.replace(tiny_run(tmp_path / "out"), data=data)
        run = resolve(config)
        with (
            open_training(run) as training,
            OpenSets(open_validation(run)) as validation,
        ):
            [loader] = validation.sets.values()
            assert loader.report.split == 0
            return training.fingerprint, loader.fingerprint

    trained, validated = zip(*map(opened, ("fit", "concat", "xtuner")), strict=True)
    assert len(set(trained)) == 3 and len(set(validated)) == 1


INT8 = ["--model=nano", "--seq_len=64", "--optim.moment_dtype=int8"]


def test_int8_moments_of_a_scan_are_updated_layer_by_layer(monkeypatch):
    """The compiled step and the memory plan choose the update by the same rule."""
    asked = []

    def make_step(*_, layered, **__):
        asked.append(layered)
        raise InterruptedError

    monkeypatch.setattr(build, "make_step", make_step)
    for flags in (["--scan_layers=True"], ["--scan_layers=False"], ["--lora.rank=4"]):
        run = resolve(parse_flags([*INT8, *flags]))
        with pytest.raises(InterruptedError):
            build.compile_training(run, *build.abstract_training(run))
    assert asked == [True, False, False]
