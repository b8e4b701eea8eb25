"""START:STOP is two steps in order, and inside the run."""

import pytest

from train.flags.config import Config
from train.flags.window import parse_window


@pytest.mark.parametrize("text", ["3", "5:4", "0:1", "a:b", ""])
def test_wrong_window(text):
    with pytest.raises(ValueError, match=f"--profile={text} must be START:STOP"):
        parse_window(text)


def test_window_beyond_the_run():
    with pytest.raises(ValueError, match="--profile=3:9 ends after --steps=8"):
        Config(profile="3:9", steps=8)
