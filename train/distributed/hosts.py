"""Several processes as one run: how they find each other, what each of them reads, and agreement.

Every process runs the same program on the same steps; what one of them alone may know (a signal, a
clock) becomes everybody's before anybody acts on it, or they would wait for each other for ever.
"""

import contextlib
import importlib.util
import logging
import os
import sys
import threading
import zlib
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from jaxattn.errors import first_line
from train.config.sections import DistConfig

OWN = ("dist.id", "data.cache", "traceback")
"""Flags that each process may have for itself."""


def connect(config: DistConfig) -> None:
    """Joins the other processes of the run, if there are any; before jax looks at its devices.

    The launchers are told by what they put into the environment: SLURM (srun), Open MPI (mpirun),
    Kubernetes (an indexed job). An allocation without one, and a launch of a single task, are not
    several processes.

    Where they do not meet in time this process ends, with one line and status 1: jax would end it
    with a page of C++.

    Raises:
        ValueError: the others cannot be reached.
        NotImplementedError: a launch that jax cannot read, and what to do.
    """
    if config.processes == 1:
        return
    given = {}
    if config.coordinator is not None:
        given = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.id,
            "cluster_detection_method": "deactivate",
        }
    elif not _launched():
        return
    # Between processes, CPU devices must meet in one order of programs; a GPU's stream keeps it.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    seconds = max(1, round(60 * config.timeout_minutes))
    where = config.coordinator or "the address that the launcher gives"
    apart = f"the processes of the run did not meet at {where}"
    with _ending_after(seconds, f"{apart} within {config.timeout_minutes:g} minutes: {_ASK}"):
        try:  # jax waits longer than this process lives
            jax.distributed.initialize(
                **given, initialization_timeout=2 * seconds, heartbeat_timeout_seconds=seconds
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{apart}: {first_line(error)}") from error


def check_same(flags: Mapping[str, object]) -> None:
    """Compares the flags of all processes, which otherwise train apart, or wait for ever.

    Args:
        flags: of this process, by name; those in `OWN` may differ.

    Raises:
        ValueError: others differ, on all processes; names them.
    """
    if jax.process_count() == 1:
        return
    names = sorted(name for name in flags if name not in OWN)
    here = np.array([zlib.crc32(repr(flags[name]).encode()) for name in names], np.uint32)
    of_all = np.asarray(multihost_utils.process_allgather(here))
    differ = [f"--{name}" for name, of_one in zip(names, of_all.T, strict=True) if np.ptp(of_one)]
    if differ:
        raise ValueError(
            f"the processes of the run were given different {', '.join(differ)}: give all the same"
        )


def share(mesh: Mesh) -> tuple[int, int]:
    """(which, of how many) parts of a batch's rows this process's devices hold.

    Processes whose devices hold the same rows, as with a `tensor` axis across them, have the same
    part.

    Raises:
        ValueError: if the processes' rows are no equal, connected parts.
    """
    of_device = np.vectorize(lambda device: device.process_index, otypes=[int])
    rows = of_device(mesh.devices.reshape(-1, mesh.shape["tensor"]))
    return share_of(jax.process_index(), rows)


def share_of(process: int, rows: Int[np.ndarray, "R M"]) -> tuple[int, int]:
    """`share`, given which process has the device [row shard, tensor shard]."""
    parts = {}
    for other in np.unique(rows):
        held = np.flatnonzero((rows == other).any(axis=1))
        parts[int(other)] = int(held[0]), len(held), int(held[-1] - held[0]) + 1
    first, count, _ = parts[process]
    if any(n != count or n != span or at % n for at, n, span in parts.values()):
        raise ValueError(
            f"the mesh gives the processes unequal parts of the rows: --mesh.tensor={rows.shape[1]}"
            " must divide, or be a multiple of, the devices of a process"
        )
    return first // count, len(rows) // count


class Agreement:
    """The largest of what the processes wish for, the same on all of them.

    One process has its wish at once. Several send it to the devices behind the step that has just
    begun, and hear the wishes of the step before it, so that nobody waits for the devices.
    """

    def __init__(self, mesh: Mesh):
        """For processes whose devices are in `mesh`."""
        self._mesh = mesh
        self._sent: jax.Array | None = None
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, wish: int) -> int:
        """The agreed wish; called by all processes, equally often."""
        if jax.process_count() == 1:
            return wish
        axes = PartitionSpec(self._mesh.axis_names)
        here = np.full(len(self._mesh.local_devices), wish, np.int32)
        with jax.set_mesh(self._mesh):
            everybody = jax.make_array_from_process_local_data(
                NamedSharding(self._mesh, axes), here, (self._mesh.size,)
            )
            heard, self._sent = self._sent, self._largest(everybody)
        return 0 if heard is None else int(heard)

    def forget(self) -> None:
        """Drops what was sent, after it has been granted another way; on all processes."""
        self._sent = None


def leave_at_once(status: int) -> NoReturn:
    """Ends this process without waiting for the others, which may be gone.

    jax would wait at exit for all to end.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


_ASK = "is each of them started, once, with the same address and its own number?"


@contextlib.contextmanager
def _ending_after(seconds: int, why: str) -> Iterator[None]:
    """Ends this process, with one line, if the block takes longer."""

    def end() -> None:
        print(f"error: {why}", file=sys.stderr)
        leave_at_once(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _launched() -> bool:
    """Whether a launcher started several processes that jax can put together."""
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
                "; --dist.processes=1 trains alone"
            )
        return True
    return False
