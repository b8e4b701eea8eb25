"""START:STOP is two steps in order, and inside the run."""

import pytest

from train.config.config import Config
from train.config.window import parse_window
from train.run.parts import with_steps


@pytest.mark.parametrize("text", ["3", "5:4", "0:1", "a:b", ""])
def test_wrong_window(text):
    with pytest.raises(ValueError, match=f"--profile={text} must be START:STOP"):
        parse_window(text)


def test_window_beyond_the_run():
    """Epochs are steps only once the data are known."""
    with pytest.raises(ValueError, match="--profile=3:9 ends after the last step, 8$"):
        Config(profile="3:9", steps=8)
    config = Config(profile="200:201", epochs=0.5)
    assert with_steps(config, 804, 2).steps == 201
    with pytest.raises(ValueError, match="200:201 ends after the last step, 200 of --epochs=0.5"):
        with_steps(config, 800, 2)
