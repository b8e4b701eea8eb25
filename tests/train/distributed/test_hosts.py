"""Several processes are one run: same losses, one checkpoint, and no one waits for the dead."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models.execution import Execution
from models.weights.load import load_hf
from models.weights.table import find_param
from models.weights.train_checkpoint import read_checkpoint
from tests.train.runs import losses, start
from train.checkpoint.checkpoints import Checkpoints
from train.config.sections import DistConfig
from train.distributed import hosts
from train.distributed.hosts import TORCHRUN, bind_address, connect, share_of

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


def launch(
    tiny, out: Path, processes: int, *, devices=8, which=0, first="", own=(), mesh=()
) -> list[int]:
    """Run the same 8 steps as `tiny_run`; return the exit statuses.

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
            "--export_every=8",
            "--export_dtype=fp32",
            f"--out={out}",
            f"--dist.coordinator=localhost:{port}",
            f"--dist.processes={processes}",
            f"--dist.id={process}",
            "--dist.timeout_minutes=0.5",
            *mesh,
        ]
        log = out.with_name(f"{out.name}.{process}.log")
        flags += own if process == processes - 1 else ()
        code = first if process == which else ""
        running.append(start(tiny, flags, devices=devices // processes, log=log, first=code))
    try:
        return [process.wait(240) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def said(out: Path, process: int) -> str:
    return out.with_name(f"{out.name}.{process}.log").read_text()


@pytest.mark.timeout(900)  # `launch` waits 240 s for each process and then fails with their logs
def test_two_processes_train_end_together_and_resume(tiny, finished, tmp_path):
    """One is killed in step 5: the other says so in one line, and both go on from step 3.

    They go on with rows whose tokens are split between the two processes.
    """
    out = tmp_path / "out"
    kill = SIGNAL_AT.format(step=5, signal="SIGKILL")
    assert launch(tiny, out, 2, which=1, first=kill) == [1, -signal.SIGKILL]
    errors = [line for line in said(out, 0).splitlines() if "error: " in line]
    assert len(errors) == 1 and "another process of the run has ended or does not an" in errors[0]
    assert "Traceback" not in said(out, 0) and "stack trace" not in said(out, 0)
    assert Checkpoints(out, keep_last=2).latest in (None, 3)

    assert launch(tiny, out, 2, devices=4, mesh=["--mesh.seq=4"]) == [0, 0]
    np.testing.assert_allclose(losses(out), losses(finished), rtol=1e-5)
    assert Checkpoints(out, keep_last=2).latest == 8
    assert "mesh.seq 4: a device has 16 of the 64 tokens of a row" in said(out, 0)
    assert "sample after 8 steps" in said(out, 0)
    execution = Execution(dtype="float32", param_dtype="float32")
    export = load_hf(out / "export" / "step-8", execution=execution)
    assert len(list((out / "export" / "step-8").glob("*.safetensors"))) > 1  # of each process
    for path, saved in read_checkpoint(out / "checkpoints" / "8").parameters():
        got = getattr(*find_param(export, path)).get_value()
        np.testing.assert_array_equal(got, saved, err_msg=path)
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
    """The coordinator is killed: the other processes end too, in bounded time."""
    out = tmp_path / "out"
    begun = time.monotonic()
    kill = SIGNAL_AT.format(step=5, signal="SIGKILL")
    assert launch(tiny, out, 2, first=kill) == [-signal.SIGKILL, 1]
    assert time.monotonic() - begun < 120
    assert "of the run has ended or does not answer: start all processes" in said(out, 1)


@pytest.mark.parametrize(
    ("processes", "shares"),
    [
        ([[0], [0], [1], [1]], [(0, 2), (1, 2)]),
        ([[0, 0], [1, 1]], [(0, 2), (1, 2)]),
        ([[0, 1]], [(0, 1), (0, 1)]),  # seq or tensor across processes: both read the same rows
        ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_each_process_reads_the_rows_of_its_devices(processes, shares):
    assert [share_of(p, np.array(processes)) for p in range(len(shares))] == shares


def test_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="unequal parts .*: --mesh.seq x --mesh.tensor = 2 must"):
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
def test_without_a_launch_of_several_nothing_is_initialized(env, monkeypatch):
    launched(monkeypatch, env)
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("initialized"))
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
    monkeypatch.setattr(hosts, "_one_line_for_aborts", lambda: None)
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
    assert "within 0.03 minutes: is each process started" in said
    assert (done.returncode, done.stdout) == (1, "")


def test_processes_with_different_flags_are_refused(tiny, tmp_path):
    """They would train apart, each its own part of the weights, or wait for each other."""
    out = tmp_path / "out"
    assert launch(tiny, out, 2, own=["--seed=7", "--steps=9"]) == [1, 1]
    for process in range(2):
        [error] = [line for line in said(out, process).splitlines() if "error: " in line]
        assert "have different --seed, --steps: give all the same" in error
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
    for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX", *TORCHRUN, "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


TORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("more", "arguments"),
    [
        ({}, {"coordinator_address": "node0:29500"}),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, {"coordinator_address": "node0:29501"}),
        (
            {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            {"coordinator_address": "node0:29500", "local_device_ids": [1]},
        ),
    ],
)
def test_variables_of_torchrun_start_a_run_of_several_processes(more, arguments, monkeypatch):
    """With torchrun's agent, which itself listens at MASTER_PORT, the next port is used."""
    launched(monkeypatch, TORCH | more)
    calls = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(hosts, "_one_line_for_aborts", lambda: None)
    connect(DistConfig())
    [given] = calls
    assert given == given | arguments | {"num_processes": 2, "process_id": 1}
    connect(DistConfig(processes=1))
    assert len(calls) == 1


@pytest.mark.parametrize("missing", TORCHRUN)
def test_torchrun_with_a_variable_missing_is_refused_by_name(missing, monkeypatch):
    launched(monkeypatch, {k: v for k, v in TORCH.items() if k != missing})
    if missing == "WORLD_SIZE":
        connect(DistConfig())  # as in a shell that has RANK for reasons of its own
        return
    with pytest.raises(ValueError, match=f"WORLD_SIZE=2 .*{missing}.*--dist.processes=1 to train"):
        connect(DistConfig())


def test_a_host_name_that_resolves_to_loopback_is_bound_on_all_interfaces(monkeypatch):
    """Debian's 127.0.1.1: other hosts must reach process 0 all the same. Else only its address."""
    addresses = {"deb": "127.0.1.1", "localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1"}
    addresses |= {"own": "127.0.0.7", "nat": "203.0.113.9"}

    def getaddrinfo(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[host], port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    port = free_port()
    anywhere = {f"[::]:{port}", f"0.0.0.0:{port}"}
    assert bind_address(f"deb:{port}") in anywhere
    assert bind_address(f"nat:{port}") in anywhere  # not an address of this machine
    assert bind_address(f"localhost:{port}") == f"127.0.0.1:{port}"
    assert bind_address(f"127.0.0.1:{port}") == f"127.0.0.1:{port}"
    monkeypatch.setattr("ipaddress.IPv4Address.is_loopback", False)
    assert bind_address(f"own:{port}") == f"127.0.0.7:{port}"  # the coordinator's alone


def test_no_socket_of_its_own_listens(monkeypatch):
    """A silent connection to the open port, which is jax's, delays nothing."""
    monkeypatch.setattr(socket.socket, "listen", lambda *_: pytest.fail("listens"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("connects"))
    bind_address(f"localhost:{free_port()}")


def train(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "train.main", "--model=nano", *flags],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )


def test_a_port_that_is_taken_is_one_line():
    """By another program, or by a second process with --dist.id=0."""
    with socket.create_server(("localhost", 0)) as server:
        where = f"--dist.coordinator=localhost:{server.getsockname()[1]}"
        done = train(where, "--dist.processes=2", "--dist.id=0")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "is taken by another program, or by a second process with --dist.id=0" in done.stderr


def test_the_same_id_twice_is_one_line_each():
    """Jax aborts each of them with a page of C++."""
    flags = [f"--dist.coordinator=localhost:{free_port()}", "--dist.processes=3"]
    flags += ["--dist.timeout_minutes=0.2"]
    command = [sys.executable, "-m", "train.main", "--model=nano", *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env}
    running = [subprocess.Popen([*command, f"--dist.id={i}"], **pipes) for i in (0, 1, 1)]
    for process in running:
        text, _ = process.communicate(timeout=240)
        assert process.returncode == 1, text
        assert text.count("\n") == 1 and "each process started, once, with the same" in text
