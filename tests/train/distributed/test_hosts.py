"""Several processes are one run: same losses, one checkpoint, and no one waits for the dead."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.runs import losses, start
from train.checkpoint.checkpoints import Checkpoints
from train.config.sections import DistConfig
from train.distributed.hosts import connect, share_of

SIGNAL_AT = """
import os, signal
from train.metrics.metrics import Metrics
record = Metrics.record
def record_or_die(self, step, *rest):
    if step == {step}:
        os.kill(os.getpid(), signal.{signal})
    return record(self, step, *rest)
Metrics.record = record_or_die
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def launch(tiny, out: Path, processes: int, *, which=0, first="", own=()) -> list[int]:
    """Runs the same 8 steps as `tiny_run` on 8 devices; returns the exit statuses.

    `first` is run in process `which` alone, and the last one has flags of its `own`. What they say
    is in <out>.<process>.log.
    """
    port = free_port()
    running = []
    for process in range(processes):
        flags = [
            "--model=tiny",
            "--attn=sdpa",
            "--seq_len=64",
            "--batch_size=8",
            "--steps=8",
            "--save_every=3",
            "--optim.lr=1e-2",
            f"--out={out}",
            f"--dist.coordinator=localhost:{port}",
            f"--dist.processes={processes}",
            f"--dist.id={process}",
        ]
        log = out.with_name(f"{out.name}.{process}.log")
        flags += own if process == processes - 1 else ()
        code = first if process == which else ""
        running.append(start(tiny, flags, devices=8 // processes, log=log, first=code))
    try:
        return [process.wait(240) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def said(out: Path, process: int) -> str:
    return out.with_name(f"{out.name}.{process}.log").read_text()


def test_two_processes_train_end_together_and_resume(tiny, finished, tmp_path):
    """One is killed in step 5: the other says so in one line, and both go on from step 3."""
    out = tmp_path / "out"
    kill = SIGNAL_AT.format(step=5, signal="SIGKILL")
    assert launch(tiny, out, 2, which=1, first=kill) == [1, -signal.SIGKILL]
    errors = [line for line in said(out, 0).splitlines() if "error: " in line]
    assert len(errors) == 1 and "process 1 of the run has ended: start all of them" in errors[0]
    assert "Traceback" not in said(out, 0) and "stack trace" not in said(out, 0)
    assert Checkpoints(out, keep_last=2).latest in (None, 3)

    assert launch(tiny, out, 2) == [0, 0]
    np.testing.assert_allclose(losses(out), losses(finished), rtol=1e-5)
    assert Checkpoints(out, keep_last=2).latest == 8
    assert "sample after 8 steps" in said(out, 0)
    assert "parameters" not in said(out, 1)  # only the first one talks


@pytest.mark.slow
def test_four_processes_stop_for_one_signal_and_resume(tiny, finished, tmp_path):
    """SIGTERM reaches one of them: all save at the same step, and two go on from there."""
    out = tmp_path / "out"
    term = SIGNAL_AT.format(step=4, signal="SIGTERM")
    assert launch(tiny, out, 4, which=2, first=term) == [0] * 4
    assert "stopped by a signal to another process after step" in said(out, 0)
    assert 4 < Checkpoints(out, keep_last=2).latest < 8
    assert launch(tiny, out, 2) == [0, 0]
    np.testing.assert_allclose(losses(out), losses(finished), rtol=1e-5)


@pytest.mark.slow
def test_process_0_killed(tiny, tmp_path):
    """The one that the others meet at: they end too, in bounded time."""
    out = tmp_path / "out"
    begun = time.monotonic()
    kill = SIGNAL_AT.format(step=5, signal="SIGKILL")
    assert launch(tiny, out, 2, first=kill) == [-signal.SIGKILL, 1]
    assert time.monotonic() - begun < 120
    assert "of the run has ended: start all of them again" in said(out, 1)


@pytest.mark.parametrize(
    ("processes", "shares"),
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
        ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),
        ([[0, 1]], [(0, 1), (0, 1)]),  # tensor across processes: both read the same rows
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_each_process_reads_the_rows_of_its_devices(processes, shares):
    assert [share_of(p, np.array(processes)) for p in range(len(shares))] == shares


def test_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="unequal parts of the rows: --mesh.tensor=2"):
        share_of(0, np.array([[0, 0], [0, 1], [1, 1]]))


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # a shell inside an allocation
        {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod of no indexed job
    ],
)
def test_without_a_launch_of_several_nothing_is_initialised(env, monkeypatch):
    launched(monkeypatch, env)
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("initialised"))
    connect(DistConfig())


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_a_launch_of_several_is_left_to_jax(env, monkeypatch):
    launched(monkeypatch, env)
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: calls.append(given))
    connect(DistConfig())
    assert calls == [{"initialization_timeout": 240, "heartbeat_timeout_seconds": 120}]
    connect(DistConfig(processes=1))
    assert len(calls) == 1


def test_kubernetes_without_its_package_says_what_to_do(monkeypatch):
    launched(monkeypatch, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(NotImplementedError, match="pip install kubernetes, or give --dist"):
        connect(DistConfig())


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_meet_are_one_line(process):
    """Process 1 never comes; or process 0, and 1 finds nobody at its address."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "train.main", "--model=nano", "--dist.processes=2"),
            *(f"--dist.coordinator=localhost:{free_port()}", f"--dist.id={process}"),
            "--dist.timeout_minutes=0.03",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    [said] = [line for line in done.stderr.splitlines() if line]
    assert "error: the processes of the run did not meet at localhost:" in said
    assert "within 0.03 minutes: is each of them started" in said
    assert (done.returncode, done.stdout) == (1, "")


def test_processes_with_different_flags_are_refused(tiny, tmp_path):
    """They would train apart, each its own part of the weights, or wait for each other."""
    out = tmp_path / "out"
    assert launch(tiny, out, 2, own=["--seed=7", "--steps=9"]) == [1, 1]
    for process in range(2):
        [error] = [line for line in said(out, process).splitlines() if "error: " in line]
        assert "were given different --seed, --steps: give all the same" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1"}, "go together"),
        ({"processes": 2}, "go together"),
        ({"coordinator": "a", "processes": 2, "id": 0}, "must be HOST:PORT"),
        ({"coordinator": ":77", "processes": 2, "id": 0}, "must be HOST:PORT"),
        ({"coordinator": "a:99999", "processes": 2, "id": 0}, "a port from 1 to 65535"),
        ({"coordinator": "a:1", "processes": 2, "id": 2}, "--dist.id=2 must be from 0 to 1"),
    ],
)
def test_contradictory_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        DistConfig(**flags)


def launched(monkeypatch, env) -> None:
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
