"""SIGKILL at any moment costs nothing but time: the run ends bitwise as if it had not been."""

import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.train.runs import losses, params, start

FLAGS = [
    "--model=tiny",
    "--attn=sdpa",
    "--seq_len=64",
    "--batch_size=4",
    "--optim.lr=1e-2",
    "--save_every=1",  # a good part of the time goes into saving, and so do the kills
]


def finish(tiny, out: Path, flags: list[str]) -> None:
    log = out.with_suffix(".log")
    assert start(tiny, [*flags, f"--out={out}"], devices=1, log=log).wait() == 0, log.read_text()


def kill(tiny, out: Path, flags: list[str], rng: random.Random) -> bool:
    """Lets a run go on and kills it; returns whether it was still running.

    One time in five before its first step, else at most 1.5 seconds after it.
    """
    metrics = out / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    process = start(tiny, [*flags, f"--out={out}"], devices=1, log=out.with_suffix(".log"))
    wait = rng.uniform(0, 1.5)
    if rng.random() < 0.2:
        wait *= 3
    else:
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.stat().st_mtime_ns == before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kills", "steps"), [(2, 16), pytest.param(25, 200, marks=pytest.mark.slow)]
)
def test_kills_at_random_moments_change_nothing(tiny, tmp_path, kills, steps):
    flags = [*FLAGS, f"--steps={steps}"]
    rng = random.Random(kills)
    killed = sum(kill(tiny, tmp_path / "killed", flags, rng) for _ in range(kills))
    assert killed == kills
    finish(tiny, tmp_path / "killed", flags)
    finish(tiny, tmp_path / "whole", flags)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ends = [params(tmp_path / name, steps) for name in ("killed", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *ends)
