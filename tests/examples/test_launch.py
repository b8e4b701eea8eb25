"""examples/launch: the files are valid, and their commands do what they promise."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"

# Stands for `python -m train.main`: joins the other processes, and ends at a signal as a run does.
TRAIN = """#!{python}
import os, sys, time
assert sys.argv[1:3] == ["-m", "train.main"], sys.argv
import jax
from train.config.sections import DistConfig
from train.distributed.hosts import connect
from train.run.signals import stop_on_signals
connect(DistConfig())
with stop_on_signals() as stop:
    with open(f"{{sys.argv[3]}}.{{jax.process_index()}}", "w") as file:
        print(jax.process_count(), *sys.argv[3:], file=file)
    while stop.name is None:
        time.sleep(0.05)
with open(f"{{sys.argv[3]}}.{{jax.process_index()}}", "a") as file:
    print(stop.name, file=file)
os._exit(0)
"""

# Stands for srun: two tasks on this host, to which signals are passed on.
SRUN = """#!/usr/bin/env bash
shift
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
while wait -n; status=$?; ((status != 127)); do :; done
"""


def install(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(text)
    path.chmod(0o755)


def test_slurm_script_joins_its_tasks_and_is_queued_again_after_the_signal(tmp_path):
    """With the variables of srun and two local processes; both get the flags and the signal."""
    for line in ("--signal=B:USR1@", "--requeue", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}" in (LAUNCH / "slurm.sh").read_text()
    install(tmp_path, "python", TRAIN.format(python=sys.executable))
    install(tmp_path, "srun", SRUN)
    install(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "SLURM_JOB_ID": str(os.getpid())}
    log = tmp_path / "log"
    with log.open("w") as output:
        job = subprocess.Popen(
            [LAUNCH / "slurm.sh", f"{tmp_path}/task", "--a b"],
            env=env,
            stdout=output,
            stderr=output,
        )
    tasks = [tmp_path / f"task.{i}" for i in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not all(task.exists() and task.read_text().endswith("\n") for task in tasks):
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0, log.read_text()
    finally:
        job.kill()
    for task in tasks:
        assert task.read_text() == f"2 {tmp_path}/task --a b\nSIGUSR1\n"
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"


@pytest.fixture
def job():
    """Return the Job of the Kubernetes file."""
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    return job


def test_kubernetes_pods_find_each_other(job):
    """Host name of pod 0 as Kubernetes gives it, <job>-<index>.<subdomain>; numbers agree."""
    spec = job["spec"]
    [container] = spec["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    host = f"{job['metadata']['name']}-0.{spec['template']['spec']['subdomain']}"
    assert spec["completionMode"] == "Indexed"
    assert env["COORDINATOR"].startswith(f"{host}:")
    assert int(env["PROCESSES"]) == spec["completions"] == spec["parallelism"]


@pytest.mark.parametrize("finished", [True, False])
def test_kubernetes_pod_succeeds_only_when_the_run_is_complete(job, tmp_path, finished):
    """SIGTERM reaches the run, which saves; a pod that was stopped early is started again."""
    made = f"mkdir -p {tmp_path}/run/checkpoints/{2000 if finished else 7}"
    install(
        tmp_path,
        "python",
        f"#!/usr/bin/env bash\ntrap '{made}; exit 0' TERM\necho \"$@\" > {tmp_path}/flags\n"
        "while :; do sleep 0.05; done\n",
    )
    [container] = job["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    env |= {"OUT": f"{tmp_path}/run", "JOB_COMPLETION_INDEX": "1"}
    env["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    pod = subprocess.Popen([*container["command"], *container["args"]], env=env)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "flags").exists() or not (tmp_path / "flags").read_text():
            assert pod.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        pod.terminate()
        assert pod.wait(60) == (0 if finished else 1)
    finally:
        pod.kill()
    flags = (tmp_path / "flags").read_text()
    assert "--dist.coordinator=internlm2-0.internlm2:9911 --dist.processes=2 --dist.id=1" in flags


def test_dockerfile_copies_what_exists_and_installs_extras_that_exist():
    """For CUDA 12 and 13; there is no Docker daemon in the tests."""
    text = (LAUNCH / "Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    names = {name for line in copied for name in line}
    assert all((ROOT / name).exists() for name in names)
    assert names >= {"pyproject.toml", "README.md", "LICENSE", "jaxattn", "models", "train"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extras] = re.findall(r"/src\[(.*)\]", text)
    for cuda in ("12", "13"):
        wanted = extras.replace("${CUDA}", cuda).split(",")
        assert set(wanted) <= project["optional-dependencies"].keys()
    [entry] = re.findall(r'ENTRYPOINT \["(.*)"\]', text)
    assert entry in project["scripts"]
