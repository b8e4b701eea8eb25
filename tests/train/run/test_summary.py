"""Log lines of a run: its parameters, and at its end its files, its time and the next commands."""

from train.config.config import Config
from train.config.sections import LoRAConfig
from train.run.resolve import resolve
from train.run.summary import describe_run


def test_last_lines_name_files_time_and_next_commands(finished):
    log = finished.with_suffix(".log").read_text().splitlines()
    done, generate, report, convert = log[-7:-3]  # before the table
    assert done.startswith("done in 0:0") and f"{finished} has checkpoints, metrics.jsonl" in done
    assert generate == f'try it:  python -m models.generate {finished} --prompt "..."'
    assert report == f"curves:  python -m train.report {finished}"
    assert convert == f"weights: python -m models.convert {finished} {finished}/hf"
    for name in ("checkpoints", "metrics.jsonl", "config.json", "sample.txt"):
        assert (finished / name).exists()


def test_trained_parameters_of_adapters_are_counted():
    run = resolve(Config(model="nano", lora=LoRAConfig(rank=4)))
    [line] = [text for text in describe_run(run) if "parameters" in text]
    assert ", beside 69,632 trained in adapters (2.10%) on " in line
