"""START:STOP is two steps in order, and inside the run."""

import dataclasses

import pytest

from train.config.config import Config
from train.run.resolve import resolve


@pytest.mark.parametrize("text", ["3", "5:4", "0:1", "a:b"])
def test_wrong_window(text):
    with pytest.raises(ValueError, match=f"--profile={text} must be START:STOP"):
        Config(profile=text)


def test_window_beyond_the_run():
    """Epochs are steps only once the data are known."""
    with pytest.raises(ValueError, match="--profile=3:9 ends after the last step, 8$"):
        Config(profile="3:9", steps=8)
    config = Config(profile="200:201", epochs=0.5)
    run = dataclasses.replace(resolve(config), rows=2)
    assert run.steps == 0 and run.with_epochs(804).steps == 201
    with pytest.raises(ValueError, match="200:201 ends after the last step, 200 of --epochs=0.5"):
        run.with_epochs(800)
