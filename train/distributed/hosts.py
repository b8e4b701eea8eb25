"""Run several processes as one: connect them, split the rows, reduce requests, end together.

Every process executes the same program on the same steps. A fact that one process alone knows (a
signal, a clock) is reduced over all processes before any process acts on it; otherwise they would
wait for each other for ever. Sockets are jax.distributed's; this module opens none that listens.
"""

import contextlib
import ctypes
import errno
import importlib.util
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state  # its key-value store, as orbax uses it
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from jaxattn.errors import first_line
from train.config.sections import DistConfig
from train.log import SafeStream

OWN = ("dist.id", "data.cache", "traceback", "log_level", "verbose")
"""Flags that may differ between the processes of a run."""

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of torchrun and of PyTorch jobs on Kubernetes."""

MOMENT = 1.5
"""Seconds in which all processes can print their own reason before the first of them exits."""

_ENDED = "internlm2-jax/ended"  # key of the store: the process that ended
_DAY_MS = 24 * 60 * 60 * 1000
RESTART = "start all processes again, and they resume from the last checkpoint"
_one_reason = threading.Lock()  # acquired by the first thread that ends this process


def connect(config: DistConfig) -> None:
    """Join the other processes of the run, if there are any, before jax looks at its devices.

    Launchers are recognized by their environment variables: SLURM (srun), Open MPI (mpirun),
    Kubernetes (an indexed job), torchrun. An allocation without a launcher, and a launch of a
    single task, are one process.

    A process that does not meet the others in time is ended with one line and status 1.

    Raises:
        ValueError: The other processes cannot be reached, or the port is taken.
        NotImplementedError: The launch cannot be read; the message has the remedy.
    """
    if config.processes == 1:
        return
    if config.coordinator is not None:
        arguments = _arguments(config.coordinator, config.processes, config.id)
    else:
        arguments = _from_torchrun()
    if not arguments and not _launched():
        return
    # CPU devices of several processes must execute programs in one order; a GPU's stream does.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    where = arguments.get("coordinator_address", "the launcher's address")
    if arguments.get("process_id") == 0:
        arguments["coordinator_bind_address"] = bind_address(where)
    seconds = max(1, round(60 * config.timeout_minutes))
    apart = f"the processes of the run did not meet at {where}"
    ask = "is each process started, once, with the same address and a number of its own?"
    global _reason_of_abort
    _reason_of_abort = f"{apart}: {ask}"
    _one_line_for_aborts()
    with _ending_after(seconds, f"{apart} within {config.timeout_minutes:g} minutes: {ask}"):
        try:  # jax waits longer than this process exists
            jax.distributed.initialize(
                **arguments, initialization_timeout=2 * seconds, heartbeat_timeout_seconds=seconds
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{apart}: {first_line(error)}") from error
    _reason_of_abort = f"another process of the run has ended or does not answer: {RESTART}"
    threading.Thread(target=_watch, daemon=True).start()


def bind_address(coordinator: str) -> str:
    """Return the address and port at which process 0 serves jax's coordination service.

    It is the address of the coordinator, HOST:PORT, where this machine has it. A host name that
    resolves to loopback (Debian's 127.0.1.1) must still be reached by other hosts, so all
    interfaces are bound for it, as for an address that is translated on the way; "localhost" itself
    stays local.

    Raises:
        ValueError: The port is taken, or the host has no address.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    try:
        [family, *_, address], *_ = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--dist.coordinator={coordinator}: {host} has no address") from error
    ip = str(address[0])
    if ipaddress.ip_address(ip).is_loopback and host not in ("localhost", ip):
        family, ip = socket.AF_INET6, "::"
    wildcards = (socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")
    for domain, candidate in ((family, ip), *wildcards):
        try:
            with socket.socket(domain) as probe:
                probe.bind((candidate, int(port)))  # without listening
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(
                    f"--dist.coordinator={coordinator}: port {port} is taken by another program, "
                    "or by a second process with --dist.id=0"
                ) from error
            continue  # not an address of this machine, or no IPv6
        return f"[{candidate}]:{port}" if domain == socket.AF_INET6 else f"{candidate}:{port}"
    raise ValueError(f"--dist.coordinator={coordinator}: port {port} cannot be bound")


def check_same(flags: Mapping[str, object]) -> None:
    """Check that all processes have the same values by flag, except for the flags in `OWN`.

    Processes with different flags would train apart, or wait for each other for ever.

    Raises:
        ValueError: Flags differ; raised on all processes, with the names of the flags.
    """
    if jax.process_count() == 1:
        return
    names = sorted(name for name in flags if name not in OWN)
    here = np.array([zlib.crc32(repr(flags[name]).encode()) for name in names], np.uint32)
    of_all = np.asarray(multihost_utils.process_allgather(here))
    differ = [f"--{name}" for name, of_one in zip(names, of_all.T, strict=True) if np.ptp(of_one)]
    if differ:
        raise ValueError(
            f"the processes of the run have different {', '.join(differ)}: give all the same"
        )


def share(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): the part of a batch's rows that this process's devices hold.

    Processes whose devices hold the same rows, as with a `seq` or `tensor` axis across them, have
    the same index.

    Raises:
        ValueError: The rows of the processes are not equal, contiguous parts.
    """
    of_device = np.vectorize(lambda device: device.process_index, otypes=[int])
    rows = of_device(mesh.devices.reshape(-1, mesh.shape["seq"] * mesh.shape["tensor"]))
    return share_of(jax.process_index(), rows)


def share_of(process: int, rows: Int[np.ndarray, "R M"]) -> tuple[int, int]:
    """Compute `share` from the process of each device [row shard, device of the shard]."""
    parts = {}
    for other in np.unique(rows):
        held = np.flatnonzero((rows == other).any(axis=1))
        parts[int(other)] = int(held[0]), len(held), int(held[-1] - held[0]) + 1
    first, count, _ = parts[process]
    if any(n != count or n != span or at % n for at, n, span in parts.values()):
        raise ValueError(
            "the mesh gives the processes unequal parts of the rows: --mesh.seq x --mesh.tensor = "
            f"{rows.shape[1]} must divide, or be a multiple of, the devices of a process"
        )
    return first // count, len(rows) // count


class RequestReducer:
    """Max-reduce a request code (0: none) over processes, one step late, without blocking.

    A single process gets its own request at once. Several processes send theirs to the devices
    behind the step that has just begun, and receive the maximum of the step before, so that no
    process waits for the devices.
    """

    def __init__(self, mesh: Mesh):
        """Prepare the reduction over all processes that have devices in `mesh`."""
        self._mesh = mesh
        self._sent: jax.Array | None = None
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, request: int) -> int:
        """Return the largest request; to be called by all processes, equally often."""
        if jax.process_count() == 1:
            return request
        axes = PartitionSpec(self._mesh.axis_names)
        here = np.full(len(self._mesh.local_devices), request, np.int32)
        with jax.set_mesh(self._mesh):
            requests = jax.make_array_from_process_local_data(
                NamedSharding(self._mesh, axes), here, (self._mesh.size,)
            )
            received, self._sent = self._sent, self._largest(requests)
        return 0 if received is None else int(received)

    def forget(self) -> None:
        """Drop the request under way, on all processes, after a checkpoint has been saved."""
        self._sent = None


def leave(reason: str) -> NoReturn:
    """Print the reason on one line, tell the other processes, and end this process with status 1.

    Only the first thread that calls this prints. jax's own exit would wait for all processes.
    """
    _one_reason.acquire()
    process = jax.process_index()
    print(f"error: process {process}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):  # the store may be gone with process 0
        _store().key_value_set(_ENDED, f"process {process}", allow_overwrite=True)
    if process == 0:  # jax aborts the others, with a page of C++, when process 0 is gone
        time.sleep(2 * MOMENT)
    _exit_now(1)


def gather(key: str, text: str) -> list[str]:
    """Return the text of each process, without a device; each call has a key of its own."""
    if jax.process_count() == 1:
        return [text]
    key = f"internlm2-jax/{key}"
    _store().key_value_set(f"{key}/{jax.process_index()}", text)
    numbers = range(jax.process_count())
    return [_store().blocking_key_value_get(f"{key}/{number}", _DAY_MS) for number in numbers]


def _store() -> Any:
    """Return the client of jax.distributed's key-value store."""
    return global_state.client


def _watch() -> None:
    """End this process when another one has left its name in the key-value store."""
    while True:
        time.sleep(MOMENT / 3)
        with contextlib.suppress(Exception):  # no such key; or the run is over, as is the store
            who = _store().key_value_try_get(_ENDED)
            time.sleep(MOMENT / 3)  # where all fail alike, each prints its own reason
            leave(f"{who} of the run has ended: {RESTART}")


def _exit_now(status: int) -> NoReturn:
    """End this process without jax's exit, which waits for all processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextlib.contextmanager
def _ending_after(seconds: int, reason: str) -> Iterator[None]:
    """End this process with one line if the block takes longer."""

    def end() -> None:
        print(f"error: {reason}", file=sys.stderr)
        _exit_now(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_aborts: Any = None  # the handler of SIGABRT, referenced here as long as C may call it
_reason_of_abort = ""


def _one_line_for_aborts() -> None:
    """Let an abort of jax's C++ be one line, `_reason_of_abort`, and status 1.

    jax's client ends the process when it loses the others. It offers no Python callback that works
    (0.11.2: std::bad_cast), and Python's own signal handlers run too late. Its page of stack frames
    is dropped: file descriptor 2 becomes a pipe, whose other lines are passed on.
    """
    global _aborts
    stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    sys.stderr = SafeStream(stderr)
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)
    threading.Thread(target=_relay, args=(read, sys.stderr), daemon=True).start()

    def end(_number: int) -> None:
        if _one_reason.acquire(timeout=4 * MOMENT):  # else another thread ends this process
            print(f"error: {_reason_of_abort}", file=stderr, flush=True)
        _exit_now(1)

    _aborts = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborts)


_LOST = re.compile(r"(client\.h|coordination_service\w*\.cc|preemption_sync_manager\.cc):\d+\]")


def _relay(read: int, stderr: Any) -> None:
    """Pass on lines of C++ except those of jax's coordination client, with their stack frames."""
    dropping = False
    with os.fdopen(read, errors="backslashreplace") as lines:
        for line in lines:
            if re.match(r"[IWEF]\d{4} ", line):
                dropping = bool(_LOST.search(line))
            if not dropping:
                stderr.write(line)


def _from_torchrun() -> dict[str, Any]:
    """Return the arguments of jax.distributed.initialize in the environment of torchrun, if any.

    Raises:
        ValueError: a variable of torchrun is missing or no number.
    """
    env = os.environ
    if env.get("WORLD_SIZE", "1") == "1":
        return {}
    try:
        rank, size, host, port = (env[name] for name in TORCHRUN)
        # torchrun's agent itself listens at MASTER_PORT.
        taken = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        arguments = _arguments(f"{host}:{int(port) + taken}", int(size), int(rank))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"WORLD_SIZE={env['WORLD_SIZE']} announces several processes, and {error} of "
            f"{', '.join(TORCHRUN)} cannot be read: set all four, or --dist.processes=1 to train "
            "with one process"
        ) from error
    if env.get("LOCAL_WORLD_SIZE", "1") != "1":  # one GPU for each process of a host
        arguments["local_device_ids"] = [int(env["LOCAL_RANK"])]
    return arguments


def _arguments(coordinator: str, processes: int | None, process: int | None) -> dict[str, Any]:
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _launched() -> bool:
    """Return whether a launcher that jax can read started several processes."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return True
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        if importlib.util.find_spec("kubernetes") is None:
            raise NotImplementedError(
                "this is an indexed Kubernetes job, which jax reads with the package kubernetes: "
                "pip install kubernetes, or give --dist.coordinator, --dist.processes and --dist.id"
                "; --dist.processes=1 trains with one process"
            )
        return True
    return False
