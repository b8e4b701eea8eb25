"""When one process of a run ends, the others say so in one line and end too.

jax's own heartbeats notice it after a while, and answer with a page of C++; until then the others
wait inside a collective. Here each process holds a TCP connection to process 0, which a dying
process's kernel closes at once. A host that vanishes without a word is left to the heartbeats.
"""

import contextlib
import secrets
import socket
import sys
import threading
import time
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.distributed.hosts import leave_at_once

_HELLO = 16  # bytes that prove to be of this run
_BYE = b"bye"
MOMENT = 2.0
"""Seconds that a process has to say why it ends, before it says that another one has ended."""
_one_says_why = threading.Lock()


class Peers:
    """Watches the other processes from entry to exit; nothing where there are none.

    Leaving it because of an error says nothing to the others: for them this process has died.
    """

    def __init__(self):
        self._sockets: dict[int, socket.socket] = {}
        self._over = False
        self._said_all = threading.Event()

    def __enter__(self) -> "Peers":
        if jax.process_count() > 1:
            self._sockets = _accept() if jax.process_index() == 0 else _connect()
            for process, link in self._sockets.items():
                threading.Thread(target=self._listen, args=(process, link), daemon=True).start()
        return self

    def __exit__(self, kind, *_) -> None:
        if not self._sockets:
            return
        if kind is None:
            multihost_utils.sync_global_devices("the run is over")
        self._over = True
        for link in self._sockets.values():
            with contextlib.suppress(OSError):  # the other one has gone: nothing to say to it
                if kind is None:
                    link.sendall(_BYE)
                link.shutdown(socket.SHUT_WR)
        self._said_all.set()

    def _listen(self, process: int, link: socket.socket) -> None:
        with link:
            try:
                heard = link.recv(len(_BYE))
            except OSError:
                heard = b""
            if heard != _BYE:
                time.sleep(MOMENT)  # where all fail alike, each has a reason of its own to say
            if heard == _BYE or self._over:
                self._said_all.wait()  # the link closes after this process's own goodbye
                return
            # What process 0 hears first, the others hear when it ends.
            who = f"process {process}" if jax.process_index() == 0 else "process 0, or another one,"
            leave(
                f"{who} of the run has ended: start all of them again, and they go on from the last"
                " checkpoint"
            )


def leave(why: str) -> NoReturn:
    """Says why on one line of stderr, and ends this process at once; only the first call speaks."""
    _one_says_why.acquire()
    print(f"error: process {jax.process_index()}: {' '.join(why.split())}", file=sys.stderr)
    if jax.process_index() == 0:
        sys.stderr.flush()
        time.sleep(MOMENT / 2)  # jax ends the others, with a page of C++, when this one is gone
    leave_at_once(1)


def _accept() -> dict[int, socket.socket]:
    """Process 0's connections, by process."""
    with socket.create_server(("", 0), backlog=jax.process_count()) as server:
        hello = secrets.token_bytes(_HELLO)
        host = socket.gethostbyname(socket.gethostname())
        _broadcast(hello + f"{host}:{server.getsockname()[1]}".encode())
        links = {}
        while len(links) < jax.process_count() - 1:
            link, _ = server.accept()
            said = link.recv(_HELLO + 4, socket.MSG_WAITALL)
            if said[:_HELLO] == hello:
                links[int.from_bytes(said[_HELLO:])] = link
            else:
                link.close()
        return links


def _connect() -> dict[int, socket.socket]:
    """Another process's connection to process 0."""
    said = _broadcast(b"")
    host, port = said[_HELLO:].decode().split(":")
    link = socket.create_connection((host, int(port)))
    link.sendall(said[:_HELLO] + jax.process_index().to_bytes(4))
    return {0: link}


def _broadcast(text: bytes) -> bytes:
    """What process 0 says."""
    said = np.frombuffer(text.ljust(_HELLO + 64, b"\0"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(said), np.uint8)).rstrip(b"\0")
