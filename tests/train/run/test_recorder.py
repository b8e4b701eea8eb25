"""A run with everything on leaves everything behind, and a resumed one leaves it once."""

import dataclasses
import json
import math
import shutil

import pytest

from models.files import LFS_HEADER
from train.config.config import Config
from train.config.sections import DataConfig
from train.metrics.samples import read_prompts
from train.run import loop


@pytest.fixture(scope="module")
def recorded(tiny_run, tmp_path_factory):
    """Train 8 steps with evaluation, samples and checkpoints at 4 and 8, resumed after 4."""
    base = tmp_path_factory.mktemp("evidence")
    (base / "held.txt").write_text("No, sir, I do not bite my thumb at you, sir. " * 20)
    (base / "one.txt").write_text("Speak the speech, I pray you, trippingly on the tongue. " * 40)
    (base / "two.txt").write_text("0123456789" * 200)
    config = dataclasses.replace(
        tiny_run(base / "out"),
        data=DataConfig(
            files=(str(base / "one.txt"), str(base / "two.txt")), val=(str(base / "held.txt"),)
        ),
        eval_every=4,
        save_every=4,
        prompts=("To be", "Speak"),
        sample_every=4,
    )
    loop.run(config)
    first = {f.name: f.read_text() for f in (base / "out").glob("*.jsonl")}
    shutil.rmtree(base / "out" / "checkpoints" / "8")  # as if it had died after step 4
    loop.run(config)
    return base / "out", first


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_validation_has_loss_and_perplexity_once(recorded):
    out, _ = recorded
    evals = lines(out / "eval.jsonl")
    assert [(line["step"], line["set"]) for line in evals] == [(4, "held"), (8, "held")]
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in evals)


def test_samples_are_greedy_and_repeat(recorded):
    """The resumed run says at step 8 what the first one said."""
    out, first = recorded
    samples = lines(out / "samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in samples] == [
        (step, prompt) for step in (4, 8) for prompt in ("To be", "Speak")
    ]
    assert (out / "samples.jsonl").read_text() == first["samples.jsonl"]


def test_metrics_split_the_time(recorded):
    out, _ = recorded
    metrics = lines(out / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [*range(1, 9)]
    for line in metrics:
        parts = ("data", "checkpoint", "evaluation", "compute")
        assert sum(line[f"{p}_seconds"] for p in parts) == pytest.approx(line["seconds"], rel=1e-3)
    assert metrics[3]["evaluation_seconds"] > 0
    assert metrics[2]["all_tokens_per_second"] == pytest.approx(8 * 64 / metrics[2]["seconds"])


def test_losses_of_the_training_files_add_up(recorded):
    """Weighted by their tokens they are the loss of the step; the digits are easier to learn."""
    out, _ = recorded
    metrics = lines(out / "metrics.jsonl")
    for line in metrics:
        parts = line["sources"].values()
        assert sum(of["loss_tokens"] for of in parts) == line["loss_tokens"]
        total = sum(of["loss"] * of["loss_tokens"] for of in parts)
        assert total == pytest.approx(line["loss"] * line["loss_tokens"], rel=1e-5)
    one, two = (metrics[-1]["sources"][str(out.parent / f"{n}.txt")] for n in ("one", "two"))
    assert two["loss"] < one["loss"] - 0.1


def test_config_is_written_as_flags_and_choices(recorded):
    record = json.loads((recorded[0] / "config.json").read_text())
    assert record["flags"]["optim.name"] == "adamw" and record["flags"]["prompts"][0] == "To be"
    assert record["chosen"]["attn"] == "xla" and record["chosen"]["batch_size"] == 8
    assert "jax" in record["versions"]


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(("zero", str(tmp_path / "p.txt"))) == ("zero", "one", "two")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no line of text"):
        read_prompts((str(tmp_path / "empty.txt"),))
    (tmp_path / "lfs.txt").write_bytes(LFS_HEADER)
    with pytest.raises(ValueError, match="^--prompts .*lfs.txt is a Git LFS pointer"):
        read_prompts((str(tmp_path / "lfs.txt"),))


def test_sampling_needs_prompts():
    with pytest.raises(ValueError, match="--sample_every=5 needs --prompts"):
        Config(sample_every=5)
